"""Keys of rows in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend.modular import permute_blocks
from embedtrain.ops.spread_keys.types import SpreadTable


def spread_keys(
    ids: Sequence[Tensor], tables: Sequence[SpreadTable], num_local_rows: int
) -> tuple[Tensor, list[int] | Tensor]:
    """See `embedtrain.ops.spread_keys`."""
    keys: list[Tensor] = []
    num_outside: list[Tensor] = []
    for given, table in zip(ids, tables, strict=True):
        wide = given.long()
        is_outside = (wide < 0) | (wide >= table.num_rows)
        ids_of_rows = wide.masked_fill(is_outside, 0)
        slots = permute_blocks(ids_of_rows, table.multiplier, table.num_rows, table.block_rows)
        owner = torch.div(slots, table.rows_per_rank, rounding_mode="floor")
        keys.append(owner * num_local_rows + (slots - owner * table.rows_per_rank + table.first_row))
        num_outside.append(is_outside.sum())
    if not keys:
        return torch.zeros(0, dtype=torch.int64), []
    counts = torch.stack(num_outside)
    return torch.cat(keys), counts if counts.is_cuda else counts.tolist()
