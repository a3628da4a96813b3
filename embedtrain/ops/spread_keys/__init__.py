"""From the ids of several features to keys of their rows, with the check that they are rows at all."""

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
    """Returns a key per id, `owner * num_local_rows + local row`, feature after feature.

    Args:
        ids: per feature [n] int64 or int32.
        tables: the table that each feature's ids are looked up in.
        num_local_rows: rows of each owner.

    Returns:
        keys: int64, one per id. An id that is not a row gets a valid but meaningless key.
        num_outside: per feature, how many ids are not rows of its table; [num_features] int64 on the device for ids of
            a GPU, whose host would have to wait.

    Raises:
        ValueError: ids are of another dtype.
    """
    for given in ids:
        if given.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"expected ids int64 or int32, got {given.dtype}")
    if ids and dispatch.uses_native(ids[0]) and all([table.is_small for table in tables]):
        return native.spread_keys(ids, tables, num_local_rows)
    return reference.spread_keys(ids, tables, num_local_rows)
