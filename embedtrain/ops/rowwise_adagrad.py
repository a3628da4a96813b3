"""The row-wise Adagrad update of the rows that a step touched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedtrain.ops import dispatch


@dataclass(frozen=True, kw_only=True)
class RowwiseAdagradStep:
    """The scalars of one update.

    Attributes:
        lr: learning rate of this step.
        eps: added outside the square root.
        weight_decay: L2 factor; added to the gradient as `weight_decay * row`, or, decoupled, taken from the
            row itself as `lr * weight_decay * row`.
        decoupled_weight_decay: which of the two.
        rounding_keys: [n] int64 for bfloat16 weights: a key per row and step for stochastic rounding.
    """

    lr: float
    eps: float
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    rounding_keys: Tensor | None = None


def rowwise_adagrad(
    weight: Tensor, accumulator: Tensor, rows: Tensor, row_grad: Tensor, step: RowwiseAdagradStep
) -> None:
    """Updates the given rows and their accumulators in place, in float32.

    With `g` the gradient of a row: `state += mean(g * g)`, then
    `row -= lr * g / (sqrt(state) + eps)` with the new state.

    Args:
        weight: [num_rows, dim] float32 or bfloat16; the local shard.
        accumulator: [num_rows] float32.
        rows: [n] int64, unique; local rows.
        row_grad: [n, dim] float32; gradient of the global mean loss, duplicates already summed.
        step: the hyperparameters of this update.

    Raises:
        ValueError: shapes or dtypes disagree.
        IndexError: a row lies outside the weight. On a GPU such rows are left out: the host would have to wait for
            the device to know of them.

    Source: Duchi et al. 2011; one accumulator a row as in Lerer et al. 2019 (PyTorch-BigGraph).
    """
    _check(weight, accumulator, rows, row_grad, step)
    if rows.numel() == 0:
        return
    if dispatch.uses_native(weight):
        from embedtrain.ops.native import rowwise_adagrad as native

        native.rowwise_adagrad(weight, accumulator, rows, row_grad, step)
    elif dispatch.uses_triton(weight):
        from embedtrain.ops.triton import rowwise_adagrad as triton

        triton.rowwise_adagrad(weight, accumulator, rows, row_grad, step)
    else:
        from embedtrain.ops.reference import rowwise_adagrad as reference

        reference.rowwise_adagrad(weight, accumulator, rows, row_grad, step)


def _check(weight: Tensor, accumulator: Tensor, rows: Tensor, row_grad: Tensor, step: RowwiseAdagradStep) -> None:
    if weight.dim() != 2 or accumulator.shape != weight.shape[:1]:
        raise ValueError(
            f"expected weight [num_rows, dim] and accumulator [num_rows], got {tuple(weight.shape)} "
            f"and {tuple(accumulator.shape)}"
        )
    if row_grad.shape != (rows.numel(), weight.shape[1]):
        raise ValueError(f"expected row_grad [{rows.numel()}, {weight.shape[1]}], got {tuple(row_grad.shape)}")
    if rows.dtype != torch.int64 or accumulator.dtype != torch.float32 or row_grad.dtype != torch.float32:
        raise ValueError(
            f"expected rows int64, accumulator and row_grad float32, got {rows.dtype}, {accumulator.dtype} "
            f"and {row_grad.dtype}"
        )
    if (weight.dtype == torch.bfloat16) != (step.rounding_keys is not None):
        raise ValueError(f"rounding_keys go with bfloat16 weights and only with them; weight is {weight.dtype}")
