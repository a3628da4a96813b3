"""Gathering of rows on a GPU: each program copies and converts one tile of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops._backend.triton_launch import num_warps, on_device_of, tile
from embedtrain.ops._backend.triton_rounding import nearest_bfloat16


def gather_rows(source: Tensor, rows: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """See `embedtrain.ops.gather_rows`."""
    source, rows = source.contiguous(), rows.contiguous()
    n, dim = rows.numel(), source.shape[1]
    gathered = torch.empty(n, dim, dtype=dtype, device=source.device) if out is None else out
    if n:
        tile_rows, tile_columns = tile(dim)
        with on_device_of(source):
            _copy_tile[(triton.cdiv(n, tile_rows),)](
                source,
                rows,
                gathered,
                n,
                DIM=dim,
                ROUNDS=source.dtype == torch.float32 and dtype == torch.bfloat16,
                TILE_ROWS=tile_rows,
                TILE_COLUMNS=tile_columns,
                num_warps=num_warps(tile_rows * tile_columns),
            )
    return gathered


@triton.jit(do_not_specialize=["n"])
def _copy_tile(
    source,
    rows,
    gathered,
    n,
    DIM: tl.constexpr,
    ROUNDS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE_COLUMNS)
    row = tl.load(rows + place, mask=place < n, other=0)
    inside = (place < n)[:, None] & (column < DIM)[None, :]
    values = tl.load(source + row[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    at = gathered + place[:, None] * DIM + column[None, :]
    if ROUNDS:
        tl.store(at, nearest_bfloat16(values), mask=inside)
    else:
        tl.store(at, values.to(gathered.dtype.element_ty), mask=inside)
