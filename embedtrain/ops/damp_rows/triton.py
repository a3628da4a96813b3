"""Damping of gradients on a GPU: each row is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops._backend.triton_launch import num_warps, on_device_of, tile
from embedtrain.ops.damp_rows.types import Damping


def damp_rows(grad: Tensor, damping: Damping) -> Tensor:
    """See `embedtrain.ops.damp_rows`."""
    grad, (tables, times, curvatures, directions) = grad.contiguous(), damping.contiguous()
    damped = torch.empty_like(grad)
    num_rows, dim = grad.shape
    if num_rows == 0:
        return damped
    tile_rows, tile_columns = tile(dim)
    with on_device_of(grad):
        _damp_tile[(triton.cdiv(num_rows, tile_rows),)](
            grad,
            tables,
            times,
            curvatures,
            directions,
            damped,
            num_rows,
            DIM=dim,
            NUM_DIRECTIONS=curvatures.shape[1],
            TILE_ROWS=tile_rows,
            TILE_COLUMNS=tile_columns,
            num_warps=num_warps(tile_rows * tile_columns),
        )
    return damped


@triton.jit(do_not_specialize=["num_rows"])
def _damp_tile(
    grad,
    tables,
    times,
    curvatures,
    directions,
    damped,
    num_rows,
    DIM: tl.constexpr,
    NUM_DIRECTIONS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE_COLUMNS)
    is_row = place < num_rows
    inside = is_row[:, None] & (column < DIM)[None, :]
    at = place[:, None] * DIM + column[None, :]
    own = tl.load(grad + at, mask=inside, other=0.0)
    time = tl.load(times + place, mask=is_row, other=0.0)
    first = tl.load(tables + place, mask=is_row, other=0) * NUM_DIRECTIONS
    result = own
    for number in range(NUM_DIRECTIONS):
        x = time * tl.maximum(tl.load(curvatures + first + number, mask=is_row, other=0.0), 0.0)
        small = x * (-1.0 / 2 + x * (1.0 / 6 + x * (-1.0 / 24 + x * (1.0 / 120))))
        excess = tl.where(x < 0.125, small, (1.0 - tl.exp(-x)) / tl.maximum(x, 0.125) - 1.0)
        vector = tl.load(directions + (first + number)[:, None] * DIM + column[None, :], mask=inside, other=0.0)
        result += (excess * tl.sum(own * vector, axis=1))[:, None] * vector
    tl.store(damped + at, result, mask=inside)
