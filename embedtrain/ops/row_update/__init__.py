"""Updates the rows that a step touched, by any formula in PyTorch or by running moments of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_update import native, reference
from embedtrain.ops.row_update.types import Direction, Moments, RowStep

__all__ = ["Direction", "Moments", "RowStep", "moment_update", "row_update"]


def row_update(
    weight: Tensor, states: Sequence[Tensor], rows: Tensor, row_grad: Tensor, step: RowStep, direction: Direction
) -> None:
    """Updates the given rows and their states in place, in float32, by a formula in PyTorch.

    Args:
        weight: [num_rows, dim] float32 or bfloat16; the local shard.
        states: [num_rows] or [num_rows, dim] float32 each.
        rows: [n] int64, unique; local rows.
        row_grad: [n, dim] float32; gradient of the global mean loss, duplicates already summed.
        step: the options that all formulas share.
        direction: the formula.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    _check_tensors(weight, states, step)
    if rows.dtype != torch.int64 or row_grad.dtype != torch.float32:
        raise ValueError(f"expected rows int64 and row_grad float32, got {rows.dtype} and {row_grad.dtype}")
    if row_grad.shape != (rows.numel(), weight.shape[1]):
        raise ValueError(f"expected row_grad [{rows.numel()}, {weight.shape[1]}], got {tuple(row_grad.shape)}")
    known = step.with_known_factor() if rows.numel() else None
    if known is not None:
        reference.row_update(weight, states, rows, row_grad, known, direction)


def moment_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    gradient: RowGradient,
    step: RowStep,
    moments: Moments,
) -> None:
    """Updates the rows of a gradient and their moments in place, in float32.

    Args:
        weight: [num_rows, dim] float32 or bfloat16; the local shard.
        first: [num_rows, dim] float32; first moments. None uses the gradient itself.
        second: [num_rows, dim] or [num_rows] float32; second moments per element or per row. None for no divisor.
        gradient: gradient of the global mean loss. Native row-wise Adagrad without clipping and damping sums its
            duplicates while it updates the rows.
        step: the options that all formulas share.
        moments: the formula's coefficients.

    Raises:
        ValueError: shapes or dtypes disagree.
        IndexError: a row, or a table of the gradient's damping, is out of range; then nothing is updated. On a GPU such
            rows are ignored, because a check would need a device sync.

    Source: sums of squares as in Duchi et al. 2011 (Adagrad), per row as in Lerer et al. 2019 (PyTorch-BigGraph);
    averages as in Tieleman and Hinton 2012 (RMSprop) and Kingma and Ba 2015 (Adam); updates of touched rows only, as in
    `torch.optim.SparseAdam`.
    """
    _check_tensors(weight, [state for state in (first, second) if state is not None], step)
    if first is not None and first.dim() != 2:
        raise ValueError(f"expected first [num_rows, dim], got {tuple(first.shape)}")
    if (gradient.num_rows, gradient.dim) != weight.shape:
        raise ValueError(
            f"expected a gradient of rows of {list(weight.shape)}, got one of [{gradient.num_rows}, {gradient.dim}]"
        )
    if gradient.rows_of_values.numel() == 0:
        return
    if dispatch.uses_triton(weight):
        from embedtrain.ops.row_update import triton

        triton.moment_update(weight, first, second, gradient.rows, gradient.values, step, moments)
        return
    known = step.with_known_factor()
    if known is None:
        return
    if dispatch.uses_native(weight):
        native.moment_update(weight, first, second, gradient, known, moments)
    else:
        reference.moment_update(weight, first, second, gradient.rows, gradient.values, known, moments)


def _check_tensors(weight: Tensor, states: Sequence[Tensor], step: RowStep) -> None:
    for state in states:
        if weight.dim() != 2 or state.shape not in (weight.shape, weight.shape[:1]):
            raise ValueError(
                f"expected weight [num_rows, dim] and state [num_rows] or [num_rows, dim], got {tuple(weight.shape)} "
                f"and {tuple(state.shape)}"
            )
        if state.dtype != torch.float32:
            raise ValueError(f"expected states float32, got {state.dtype}")
    if (weight.dtype == torch.bfloat16) != (step.rounding_keys is not None):
        raise ValueError(f"rounding_keys must be given for bfloat16 weights and no others; weight is {weight.dtype}")
