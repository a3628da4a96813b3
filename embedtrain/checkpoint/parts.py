"""The rows of a global tensor that a rank writes to a checkpoint, and their source."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from embedtrain.checkpoint.header import row_blocks, selected_blocks
from embedtrain.embedding.row_changes import MemoryBudget, RowChanges, RowSnapshot
from embedtrain.embedding.shard_view import ShardView

_Table = tuple[int, int]


@dataclass(frozen=True)
class TensorPart:
    """A rank's rows of a global tensor: a whole range, or in a delta only its changed rows.

    Attributes:
        name: see `ShardView`.
        global_shape: see `ShardView`.
        dtype: dtype of the elements.
        layout: see `ShardView`.
        offset: first row of the range.
        span: number of rows in the range.
        slots: [n] int64 on the CPU, ascending; the rows of the range that are written. None for all. Tensors
            whose rows change together, such as a weight and its state, share one `slots` tensor.
        blocks: returns the written rows in CPU blocks; a block is valid until the next one is taken.
    """

    name: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Mapping[str, Any]
    offset: int
    span: int
    slots: Tensor | None
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def num_rows(self) -> int:
        """Returns the number of rows that are written."""
        return self.span if self.slots is None else len(self.slots)

    def like(self) -> Tensor:
        """Returns a meta tensor of the shape and dtype that is written."""
        return torch.empty((self.num_rows, *self.global_shape[1:]), dtype=self.dtype, device="meta")


def whole_parts(shards: Iterable[ShardView]) -> list[TensorPart]:
    """Returns the shards with all their rows, read in place; the shards must not change until they are written."""
    return [_part(view, None, functools.partial(row_blocks, view.tensor)) for view in shards]


class StagedParts:
    """Fixes the current values of the shards, so that they can be written while an optimizer changes them.

    Shards with `RowChanges` are copied row by row when a row changes; other shards are copied at once.

    Args:
        shards: this rank's shards.
        is_delta: whether to write only the rows that changed since the last staging.
        budget: bounds the memory of copies; None if the shards do not change until they are written.

    Attributes:
        parts: the parts to write, in any order; the blocks of each part can be read once.
    """

    def __init__(self, shards: Sequence[ShardView], *, is_delta: bool, budget: MemoryBudget | None) -> None:
        self._groups: dict[int, RowChanges] = {id(view.changes): view.changes for view in shards if view.changes}
        touched = {key: changes.touched_since_last_taken() for key, changes in self._groups.items()}
        self._snapshots: dict[int, RowSnapshot] = {}
        if budget is not None:
            for key, changes in self._groups.items():
                self._snapshots[key] = changes.snapshot(budget, touched[key] if is_delta else None)
        self._num_unread = Counter(_table_of(view) for view in shards)
        rows: dict[_Table, Tensor] = {}
        slots: dict[_Table, Tensor] = {}
        for view in shards if is_delta else ():
            table, group = _table_of(view), touched.get(id(view.changes))
            if group is not None and table not in rows:
                local = group[view.first_row : view.first_row + len(view.tensor)].nonzero().squeeze(1)
                rows[table], slots[table] = local + view.first_row, local.cpu() + view.offset
        self.parts = [
            _part(view, slots.get(_table_of(view)), self._source(view, rows.get(_table_of(view)), budget is not None))
            for view in shards
        ]

    def release(self) -> None:
        """Frees all copies and lets optimizer updates that wait for rows to be read continue."""
        for changes in self._groups.values():
            changes.release()

    def _source(self, view: ShardView, rows: Tensor | None, is_changing: bool) -> Callable[[], Iterable[Tensor]]:
        if view.changes is not None and is_changing:
            return functools.partial(self._snapshot_blocks, view, rows)
        if rows is not None:
            return functools.partial(selected_blocks, view.tensor, rows - view.first_row)
        return functools.partial(row_blocks, view.tensor.detach().clone() if is_changing else view.tensor)

    def _snapshot_blocks(self, view: ShardView, rows: Tensor | None) -> Iterator[Tensor]:
        table, snapshot = _table_of(view), self._snapshots[id(view.changes)]
        self._num_unread[table] -= 1
        wanted = range(view.first_row, view.first_row + len(view.tensor)) if rows is None else rows
        name = view.name.rpartition("/")[2]
        yield from snapshot.blocks(name, wanted, is_last=self._num_unread[table] == 0)
        if not any(self._num_unread[each] for each in self._num_unread if each[0] == table[0]):
            snapshot.finish()


def _table_of(view: ShardView) -> _Table:
    """Returns a key that the shards of one table share: their table group and their first row in it."""
    return id(view.changes), view.first_row


def _part(view: ShardView, slots: Tensor | None, blocks: Callable[[], Iterable[Tensor]]) -> TensorPart:
    return TensorPart(
        view.name,
        view.global_shape,
        view.tensor.dtype,
        dict(view.layout),
        view.offset,
        len(view.tensor),
        slots,
        blocks,
    )
