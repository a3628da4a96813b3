"""The row-wise Adagrad update, fused: each touched row and its accumulator are read once and written once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops.rowwise_adagrad import RowwiseAdagradStep
from embedtrain.ops.triton.launch import num_warps, on_device_of, tile
from embedtrain.ops.triton.rounding import round_to_bfloat16


def rowwise_adagrad(
    weight: Tensor, accumulator: Tensor, rows: Tensor, row_grad: Tensor, step: RowwiseAdagradStep
) -> None:
    """See `embedtrain.ops.rowwise_adagrad`.

    Raises:
        ValueError: the weight or the accumulator is not contiguous: the kernel writes them in place.
    """
    if not (weight.is_contiguous() and accumulator.is_contiguous()):
        raise ValueError("weight and accumulator must be contiguous")
    rows, row_grad = rows.contiguous(), row_grad.contiguous()
    keys = rows if step.rounding_keys is None else step.rounding_keys.contiguous()
    num_rows, dim = weight.shape
    tile_rows, tile_columns = tile(dim)
    with on_device_of(weight):
        _update_tile[(triton.cdiv(rows.numel(), tile_rows),)](
            weight,
            accumulator,
            rows,
            row_grad,
            keys,
            rows.numel(),
            num_rows,
            dim,
            float(step.lr),
            float(step.eps),
            0.0 if step.decoupled_weight_decay else float(step.weight_decay),
            1.0 - step.lr * step.weight_decay if step.decoupled_weight_decay else 1.0,
            HAS_KEYS=step.rounding_keys is not None,
            TILE_ROWS=tile_rows,
            TILE_COLUMNS=tile_columns,
            num_warps=num_warps(tile_rows * tile_columns),
        )


@triton.jit
def _update_tile(
    weight,
    accumulator,
    rows,
    row_grad,
    keys,
    n,
    num_rows,
    dim,
    lr,
    eps,
    coupled_decay,
    kept,
    HAS_KEYS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE_COLUMNS)
    row = tl.load(rows + place, mask=place < n, other=-1)
    is_row = (row >= 0) & (row < num_rows)
    inside = is_row[:, None] & (column < dim)[None, :]
    at = weight + row[:, None] * dim + column[None, :]
    old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(row_grad + place[:, None] * dim + column[None, :], mask=inside, other=0.0)
    grad += coupled_decay * old
    state = tl.load(accumulator + row, mask=is_row, other=0.0) + tl.sum(grad * grad, axis=1) / dim
    tl.store(accumulator + row, state, mask=is_row)
    new = kept * old - grad * tl.div_rn(lr, tl.sqrt_rn(state) + eps)[:, None]
    if HAS_KEYS:
        key = tl.load(keys + place, mask=place < n, other=0)
        tl.store(at, round_to_bfloat16(new, key, column), mask=inside)
    else:
        tl.store(at, new, mask=inside)
