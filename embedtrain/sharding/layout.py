"""Layouts of tables: the `Layout` protocol, and `SpreadLayout`, the default.

`SpreadLayout` maps row `id` of a table of `num_rows` rows to slot `(multiplier * id) mod num_rows`. Each rank owns a
contiguous range of slots. Low ids are the hot ones, because vocabularies are sorted by frequency. A multiplier near
`num_rows` / golden ratio spreads every prefix of the ids evenly over any number of ranks. Of the first k ids, a rank
with a share s of the slots owns between `k*s - b` and `k*s + b`, where `b = 1 + log2(k + 1)`.

Tables too large for the cache spread blocks of B = 16 ids instead of single ids. Hot rows then share memory pages and
their accumulators share cache lines, which makes reading and updating them 13 to 15 % faster. The bound becomes
`b = B * (3 + log2(k / B + 1))`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from embedtrain.errors import CheckpointError
from embedtrain.ops._backend.modular import permute_blocks
from embedtrain.ops.spread_keys import SpreadTable, spread_keys
from embedtrain.spec import DEFAULT_LAYOUT

MAX_ROWS = 1 << 40
"""Largest table; larger ones would overflow the 64-bit products of `multiply_modulo`."""

_CANDIDATES = 64
_BLOCK_ROWS = 16
"""Larger blocks are faster but concentrate hot rows. These are the extra rows of the busiest rank over the mean, with
blocks of 16 ids, for ids that follow Zipf's law, in steps of 4,096 and of 65,536 ids per rank: 13 % and 1 % on 16
ranks, 171 % and 17 % on 256 ranks."""
_MIN_ROWS_TO_BLOCK = 1 << 17


KeyMap = Callable[[Sequence[int], Sequence[Tensor]], tuple[Tensor, list[int] | Tensor]]
"""Maps the ids of features to keys.

Takes per feature the index of its table and its ids ([n] int64 or int32). Returns one key per id, `owner * rows per
owner + local row`, in the order of the features; and per feature the number of ids out of range, whose keys are
undefined. For ids on a GPU these numbers stay on the device.
"""


class Layout(Protocol):
    """Maps the ids of a table to slots and slots to ranks, and back. The slots do not depend on the world size.

    A new kind of layout is a class with these members, constructed from `num_rows` and `world_size`, in `LAYOUTS`.
    """

    @property
    def num_rows(self) -> int:
        """Number of rows of the table."""

    @property
    def description(self) -> dict[str, Any]:
        """The layout's entry in a checkpoint's manifest, as JSON; "kind" is its name in `LAYOUTS`."""

    @property
    def rows_per_rank(self) -> int:
        """Number of slots per rank; the last ranks may own fewer or none."""

    def slot_of(self, ids: Tensor) -> Tensor:
        """Returns the slots of `ids`, int64, each in `[0, num_rows)`; same shape."""

    def id_of(self, slots: Tensor) -> Tensor:
        """Returns the ids at `slots`; the inverse of `slot_of`."""

    def shard_range(self, rank: int) -> tuple[int, int]:
        """Returns the half-open range of slots that `rank` owns; empty if the ranks outnumber the rows."""

    @classmethod
    def key_map(cls, layouts: Sequence[Any], first_rows: Sequence[int], num_local_rows: int) -> KeyMap:
        """Returns the function that maps ids of a table group of this kind to keys.

        Args:
            layouts: layouts of the tables.
            first_rows: first local row of each table.
            num_local_rows: rows per owner, over all tables of the group.
        """


@dataclass(frozen=True)
class SpreadLayout:
    """Spreads low ids evenly over the ranks; see the module's docstring. Slots do not depend on the world size.

    Attributes:
        num_rows: rows of the table, 1 to 2**40.
        world_size: number of ranks that share the table.
    """

    num_rows: int
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_rows <= MAX_ROWS:
            raise ValueError(f"num_rows must be 1 to 2**40, got {self.num_rows}")
        if self.world_size < 1:
            raise ValueError(f"world_size must be at least 1, got {self.world_size}")

    @property
    def description(self) -> dict[str, Any]:
        """The layout's entry in a checkpoint's manifest; "block_rows" is present only if it is more than 1."""
        blocks = {} if self.block_rows == 1 else {"block_rows": self.block_rows}
        return {"kind": "spread", "multiplier": self.multiplier, **blocks}

    @property
    def block_rows(self) -> int:
        """Number of consecutive ids per block; depends on `num_rows` only, like everything that decides slots."""
        return 1 if self.num_rows < _MIN_ROWS_TO_BLOCK else _BLOCK_ROWS

    @property
    def multiplier(self) -> int:
        """The factor `A` in `slot = (A * id) mod num_rows`, or in the same formula for block numbers."""
        return spread_multiplier(self._num_blocks)

    @property
    def _num_blocks(self) -> int:
        return self.num_rows // self.block_rows

    @classmethod
    def key_map(cls, layouts: Sequence[SpreadLayout], first_rows: Sequence[int], num_local_rows: int) -> KeyMap:
        """See `Layout`."""
        tables = [
            SpreadTable(each.num_rows, each.multiplier, each.rows_per_rank, first_row, each.block_rows)
            for each, first_row in zip(layouts, first_rows, strict=True)
        ]

        def keys_of(numbers: Sequence[int], ids: Sequence[Tensor]) -> tuple[Tensor, list[int] | Tensor]:
            return spread_keys(ids, [tables[number] for number in numbers], num_local_rows)

        return keys_of

    @property
    def rows_per_rank(self) -> int:
        """Number of slots per rank; the last ranks may own fewer or none (torch's even-chunk split)."""
        return -(-self.num_rows // self.world_size)

    def slot_of(self, ids: Tensor) -> Tensor:
        """Returns the slots of `ids`, int64, each in `[0, num_rows)`; same shape."""
        return permute_blocks(ids, self.multiplier, self.num_rows, self.block_rows)

    def id_of(self, slots: Tensor) -> Tensor:
        """Returns the ids at `slots`; the inverse of `slot_of`."""
        return permute_blocks(slots, _inverse_multiplier(self._num_blocks), self.num_rows, self.block_rows)

    def shard_range(self, rank: int) -> tuple[int, int]:
        """Returns the half-open range of slots that `rank` owns; empty if there are more ranks than rows."""
        start = min(rank * self.rows_per_rank, self.num_rows)
        return start, min(start + self.rows_per_rank, self.num_rows)

    def owner_of(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the owning rank of each slot and the row inside that rank's shard, both int64."""
        owner = torch.div(slots, self.rows_per_rank, rounding_mode="floor")
        return owner, slots - owner * self.rows_per_rank


def overlap(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int] | None:
    """Returns the intersection of two half-open intervals `[start, stop)`, or None if they are disjoint."""
    start, stop = max(first[0], second[0]), min(first[1], second[1])
    return (start, stop) if start < stop else None


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"spread": SpreadLayout}
"""Layouts by their names in `TableSpec.layout` and in checkpoints."""


def layout_of(num_rows: int, world_size: int = 1, kind: str = DEFAULT_LAYOUT) -> Layout:
    """Returns the layout of a table.

    Raises:
        ValueError: the kind is unknown, or a size is out of range.
    """
    if kind not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {kind!r}")
    return LAYOUTS[kind](num_rows, world_size)


def read_layout(saved: Mapping[str, Any], num_rows: int, table: str) -> Layout:
    """Returns the layout that a checkpoint's manifest describes.

    Raises:
        CheckpointError: this version does not support the layout and would load wrong rows.
    """
    kind = str(saved.get("kind", ""))
    layout = layout_of(num_rows, kind=kind if kind in LAYOUTS else DEFAULT_LAYOUT)
    if dict(saved) != layout.description:
        raise CheckpointError(
            f"table {table!r} has the layout {dict(saved)}, but this embedtrain reads only {layout.description}"
        )
    return layout


@functools.lru_cache(maxsize=4096)
def spread_multiplier(modulus: int) -> int:
    """Returns the multiplier, coprime to `modulus` and near `modulus` / golden ratio, that spreads prefixes best.

    The number of the first k multiples of A modulo N in an interval of length N/W deviates from k/W by at most the sum
    of the partial quotients of A/N. Of the coprime candidates nearest the golden section, the one with the smallest sum
    is chosen.

    Source: Niederreiter 1992, "Random Number Generation and Quasi-Monte Carlo Methods", theorem 3.4.
    """
    golden = (math.isqrt(5 * modulus * modulus) - modulus) // 2
    candidates = [
        candidate
        for distance in range(_CANDIDATES)
        for candidate in {golden - distance, golden + distance}
        if 1 <= candidate < max(modulus, 2) and math.gcd(candidate, modulus) == 1
    ]
    return min(candidates, key=lambda a: (_sum_of_partial_quotients(a, modulus), abs(a - golden), a))


@functools.lru_cache(maxsize=4096)
def _inverse_multiplier(modulus: int) -> int:
    return pow(spread_multiplier(modulus), -1, modulus) if modulus > 1 else 0


def _sum_of_partial_quotients(numerator: int, denominator: int) -> int:
    total = 0
    while numerator:
        quotient, remainder = divmod(denominator, numerator)
        total += quotient
        numerator, denominator = remainder, numerator
    return total
