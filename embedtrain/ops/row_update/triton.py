"""Fused updates by running moments on a GPU: each touched row and its states are read once and written once."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops._backend.triton_launch import num_warps, on_device_of, tile
from embedtrain.ops._backend.triton_rounding import round_to_bfloat16
from embedtrain.ops.row_update.types import Moments, RowStep

_NO_SECOND, _SECOND_OF_ROW, _SECOND_OF_ELEMENT = range(3)


def moment_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    rows: Tensor,
    row_grad: Tensor,
    step: RowStep,
    moments: Moments,
) -> None:
    """See `embedtrain.ops.row_update`; rows that are out of range are ignored.

    Raises:
        ValueError: the weight or a state is not contiguous, which the kernel needs to write in place.
    """
    if not all(tensor is None or tensor.is_contiguous() for tensor in (weight, first, second)):
        raise ValueError("weight and states must be contiguous")
    kind = _NO_SECOND if second is None else (_SECOND_OF_ROW if second.dim() == 1 else _SECOND_OF_ELEMENT)
    rows, row_grad = rows.contiguous(), row_grad.contiguous()
    if rows.numel() == 0:
        return
    is_factor_on_device = isinstance(step.grad_factor, Tensor)
    num_rows, dim = weight.shape
    tile_rows, tile_columns = tile(dim)
    with on_device_of(weight):
        _update_tile[(triton.cdiv(rows.numel(), tile_rows),)](
            weight,
            weight if first is None else first,
            weight if second is None else second,
            rows,
            row_grad,
            rows if step.rounding_keys is None else step.rounding_keys.contiguous(),
            rows.numel(),
            num_rows,
            float(step.lr / moments.first_correction),
            step.grad_factor if is_factor_on_device else float(step.grad_factor),
            float(step.max_row_grad_norm),
            float(step.coupled_decay),
            float(step.row_factor),
            float(step.max_norm),
            1.0 - moments.first_decay,
            float(moments.second_decay),
            float(moments.second_gain),
            float(moments.second_correction),
            float(moments.eps),
            DIM=dim,
            LOADS_FACTOR=is_factor_on_device,
            HAS_FIRST=first is not None,
            SECOND=kind,
            CLIPS=step.max_row_grad_norm < math.inf,
            BOUNDS=step.max_norm < math.inf,
            HAS_KEYS=step.rounding_keys is not None,
            TILE_ROWS=tile_rows,
            TILE_COLUMNS=tile_columns,
            num_warps=num_warps(tile_rows * tile_columns),
        )


@triton.jit
def _factor_to(max_norm, values):
    """Returns the factor that scales each row down to a norm; 1 if its norm is not larger."""
    return tl.div_rn(max_norm, tl.maximum(tl.sqrt_rn(tl.sum(values * values, axis=1)), max_norm))[:, None]


@triton.jit(do_not_specialize=["n", "num_rows"])
def _update_tile(
    weight,
    first,
    second,
    rows,
    row_grad,
    keys,
    n,
    num_rows,
    step_size,
    grad_factor,
    max_row_grad_norm,
    coupled_decay,
    row_factor,
    max_norm,
    first_gain,
    second_decay,
    second_gain,
    second_correction,
    eps,
    DIM: tl.constexpr,
    LOADS_FACTOR: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    CLIPS: tl.constexpr,
    BOUNDS: tl.constexpr,
    HAS_KEYS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, TILE_COLUMNS)
    row = tl.load(rows + place, mask=place < n, other=-1)
    is_row = (row >= 0) & (row < num_rows)
    if LOADS_FACTOR:
        # Loaded once per row of the tile, because the interpreter compares vectors only.
        factor = tl.load(grad_factor + tl.arange(0, TILE_ROWS) * 0)
        is_row = is_row & (factor == factor)  # a factor of NaN skips all rows
    else:
        factor = tl.zeros([TILE_ROWS], dtype=tl.float32) + grad_factor
    inside = is_row[:, None] & (column < DIM)[None, :]
    at = row[:, None] * DIM + column[None, :]
    old = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(row_grad + place[:, None] * DIM + column[None, :], mask=inside, other=0.0)
    grad *= factor[:, None]
    if CLIPS:
        grad *= _factor_to(max_row_grad_norm, grad)
    grad += coupled_decay * old
    taken = grad
    if HAS_FIRST:
        before = tl.load(first + at, mask=inside, other=0.0)
        taken = before + first_gain * (grad - before)
        tl.store(first + at, taken, mask=inside)
    if SECOND == 1:
        mean = tl.div_rn(tl.sum(grad * grad, axis=1), tl.full([TILE_ROWS], DIM, tl.float32))
        state = second_decay * tl.load(second + row, mask=is_row, other=1.0) + second_gain * mean
        tl.store(second + row, state, mask=is_row)
        taken *= tl.div_rn(step_size, tl.div_rn(tl.sqrt_rn(state), second_correction) + eps)[:, None]
    elif SECOND == 2:
        state = second_decay * tl.load(second + at, mask=inside, other=1.0) + second_gain * grad * grad
        tl.store(second + at, state, mask=inside)
        taken = tl.div_rn(step_size * taken, tl.div_rn(tl.sqrt_rn(state), second_correction) + eps)
    else:
        taken *= step_size
    new = row_factor * old - taken
    if BOUNDS:
        new *= _factor_to(max_norm, tl.where(inside, new, 0.0))
    if HAS_KEYS:
        key = tl.load(keys + place, mask=place < n, other=0)
        tl.store(weight + at, round_to_bfloat16(new, key, column), mask=inside)
    else:
        tl.store(weight + at, new, mask=inside)
