"""The parameters that map the ids of a table to rows."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from embedtrain.ops._backend.modular import DIRECT_PRODUCT_ROWS


@dataclass(frozen=True)
class SpreadTable:
    """Describes how the rows of a table are spread over owners.

    Attributes:
        num_rows: number of rows; ids are 0 to `num_rows - 1`.
        multiplier: factor of the permutation; see `embedtrain.ops._backend.modular.permute_blocks`.
        rows_per_rank: number of slots per owner.
        first_row: first local row of the table at every owner.
        block_rows: number of consecutive ids that stay adjacent; a power of two.
    """

    num_rows: int
    multiplier: int
    rows_per_rank: int
    first_row: int
    block_rows: int

    @functools.cached_property
    def is_small(self) -> bool:
        """Whether products of ids and the multiplier fit into 64 bits, which the native kernel requires."""
        return self.num_rows <= DIRECT_PRODUCT_ROWS

    @functools.cached_property
    def words(self) -> tuple[int, ...]:
        """The members of `EmbedtrainIds` that describe the table, and a zero for the count that the kernel writes."""
        block_bits = self.block_rows.bit_length() - 1
        return (self.num_rows, self.multiplier, self.rows_per_rank, self.first_row, block_bits, 0)
