"""Maps the ids of several features to keys of their rows, and counts ids that are out of range."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.spread_keys import native, reference
from embedtrain.ops.spread_keys.types import SpreadTable

__all__ = ["SpreadTable", "spread_keys"]


def spread_keys(
    ids: Sequence[Tensor], tables: Sequence[SpreadTable], num_local_rows: int
) -> tuple[Tensor, list[int] | Tensor]:
    """Returns a key per id, `owner * num_local_rows + local row`, ordered by feature.

    Args:
        ids: one tensor per feature, [n] int64 or int32.
        tables: the table of each feature.
        num_local_rows: number of rows per owner.

    Returns:
        keys: int64, one per id. An id that is out of range gets a valid but meaningless key.
        num_outside: number of ids per feature that are out of range. For ids on a GPU, [num_features] int64 on the
            device, because a list would need a device sync.

    Raises:
        ValueError: the ids have another dtype.
    """
    for given in ids:
        if given.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"expected ids int64 or int32, got {given.dtype}")
    if ids and dispatch.uses_native(ids[0]) and all([table.is_small for table in tables]):
        return native.spread_keys(ids, tables, num_local_rows)
    return reference.spread_keys(ids, tables, num_local_rows)
