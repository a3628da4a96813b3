"""Calls the native kernel that computes keys."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.spread_keys.types import SpreadTable

_MEMBERS = (
    "ids",
    "is_int32",
    "num_ids",
    "num_rows",
    "multiplier",
    "rows_per_rank",
    "first_row",
    "block_bits",
    "num_outside",  # the kernel writes it
)
_IDS = library.array_code("EmbedtrainIds", *_MEMBERS)
_NUM_OUTSIDE = slice(_MEMBERS.index("num_outside"), None, len(_MEMBERS))


def spread_keys(ids: Sequence[Tensor], tables: Sequence[SpreadTable], num_local_rows: int) -> tuple[Tensor, list[int]]:
    """See `embedtrain.ops.spread_keys`."""
    ids = [given.contiguous() for given in ids]
    words: list[int] = []
    num_keys = 0
    for given, table in zip(ids, tables, strict=True):
        num_ids = given.numel()
        num_keys += num_ids
        words += (given.data_ptr(), given.dtype == torch.int32, num_ids, *table.words)
    features = array(_IDS, words)
    keys = empty_buffer(num_keys, dtype=torch.int64)
    library.get().embedtrain_spread_keys(
        features.buffer_info()[0],
        len(ids),
        num_local_rows,
        int(all([table.rows_per_rank >= table.num_rows for table in tables])),
        keys.data_ptr(),
    )
    return keys, features[_NUM_OUTSIDE].tolist()
