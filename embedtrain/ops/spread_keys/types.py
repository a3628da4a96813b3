"""Where the rows of a table lie."""

from __future__ import annotations

from dataclasses import dataclass


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
