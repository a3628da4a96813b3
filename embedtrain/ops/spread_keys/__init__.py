"""From the ids of several features to keys of their rows, with the check that they are rows at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from embedtrain.ops._backend import dispatch
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


def spread_keys(ids: Sequence[Tensor], tables: Sequence[SpreadTable], num_local_rows: int) -> tuple[Tensor, list[int]]:
    """Returns a key per id, `owner * num_local_rows + local row`, feature after feature.

    Args:
        ids: per feature [n] int64 or int32.
        tables: where each feature's ids are looked up.
        num_local_rows: rows of each owner.

    Returns:
        keys: int64, as many as there are ids. An id that is no row gets a valid key that means nothing.
        num_outside: per feature, how many ids are not rows of its table.
    """
    is_small = all(table.num_rows <= DIRECT_PRODUCT_ROWS for table in tables)
    if ids and is_small and dispatch.uses_native(ids[0]):
        from embedtrain.ops.spread_keys import native

        return native.spread_keys(ids, tables, num_local_rows)
    from embedtrain.ops.spread_keys import reference

    return reference.spread_keys(ids, tables, num_local_rows)
