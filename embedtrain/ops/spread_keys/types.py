"""Where the rows of a table lie."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from embedtrain.ops._backend.modular import DIRECT_PRODUCT_ROWS


@dataclass(frozen=True)
class SpreadTable:
    """Where the rows of a table lie.

    Attributes:
        num_rows: ids are 0 to num_rows - 1.
        multiplier: of the spread; see `embedtrain.ops._backend.modular.permute_blocks`.
        rows_per_rank: slots of each owner.
        first_row: where the table begins among an owner's rows.
        block_rows: ids that stay side by side; a power of two.
    """

    num_rows: int
    multiplier: int
    rows_per_rank: int
    first_row: int
    block_rows: int

    @functools.cached_property
    def is_small(self) -> bool:
        """Whether products of ids and the multiplier fit into 64 bits, as the native kernel has them."""
        return self.num_rows <= DIRECT_PRODUCT_ROWS

    @functools.cached_property
    def words(self) -> tuple[int, ...]:
        """The members of `EmbedtrainIds` that tell of the table, and a zero for the count that the kernel writes."""
        block_bits = self.block_rows.bit_length() - 1
        return (self.num_rows, self.multiplier, self.rows_per_rank, self.first_row, block_bits, 0)
