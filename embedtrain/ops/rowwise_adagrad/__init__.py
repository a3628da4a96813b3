"""The row-wise Adagrad update of the rows that a step touched."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.rowwise_adagrad import native, reference
from embedtrain.ops.rowwise_adagrad.types import RowwiseAdagradStep

__all__ = ["RowwiseAdagradStep", "rowwise_adagrad"]


def rowwise_adagrad(weight: Tensor, accumulator: Tensor, gradient: RowGradient, step: RowwiseAdagradStep) -> None:
    """Updates the rows of a gradient and their accumulators in place, in float32.

    With `g` the gradient of a row: `state += mean(g * g)`, then
    `row -= lr * g / (sqrt(state) + eps)` with the new state.

    Args:
        weight: [num_rows, dim] float32 or bfloat16; the local shard.
        accumulator: [num_rows] float32.
        gradient: of the global mean loss; what is not summed yet is summed on the way.
        step: the hyperparameters of this update.

    Raises:
        ValueError: shapes or dtypes disagree.
        IndexError: a row lies outside the weight. On a GPU such rows are left out: the host would have to wait for
            the device to know of them.

    Source: Duchi et al. 2011; one accumulator a row as in Lerer et al. 2019 (PyTorch-BigGraph).
    """
    _check(weight, accumulator, gradient, step)
    if dispatch.uses_native(weight):
        native.rowwise_adagrad(weight, accumulator, gradient, step)
    elif dispatch.uses_triton(weight):
        from embedtrain.ops.rowwise_adagrad import triton

        triton.rowwise_adagrad(weight, accumulator, gradient, step)
    else:
        reference.rowwise_adagrad(weight, accumulator, gradient.rows, gradient.values, step)


def _check(weight: Tensor, accumulator: Tensor, gradient: RowGradient, step: RowwiseAdagradStep) -> None:
    if weight.dim() != 2 or accumulator.shape != weight.shape[:1]:
        raise ValueError(
            f"expected weight [num_rows, dim] and accumulator [num_rows], got {tuple(weight.shape)} "
            f"and {tuple(accumulator.shape)}"
        )
    if gradient.dim != weight.shape[1] or gradient.num_rows != weight.shape[0]:
        raise ValueError(
            f"expected a gradient of rows of [{weight.shape[0]}, {weight.shape[1]}], got one of "
            f"[{gradient.num_rows}, {gradient.dim}]"
        )
    if accumulator.dtype != torch.float32:
        raise ValueError(f"expected an accumulator of float32, got {accumulator.dtype}")
    if (weight.dtype == torch.bfloat16) != (step.rounding_keys is not None):
        raise ValueError(f"rounding_keys go with bfloat16 weights and only with them; weight is {weight.dtype}")
