"""The row-wise Adagrad update: second moments of rows, summed, and no first ones."""

from __future__ import annotations

from torch import Tensor

from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_update import Moments, RowStep
from embedtrain.ops.row_update.triton import moment_update
from embedtrain.ops.rowwise_adagrad.types import RowwiseAdagradStep


def rowwise_adagrad(weight: Tensor, accumulator: Tensor, gradient: RowGradient, step: RowwiseAdagradStep) -> None:
    """See `embedtrain.ops.rowwise_adagrad`; rows outside the weight are left out."""
    row_step = RowStep(
        lr=step.lr,
        weight_decay=step.weight_decay,
        decoupled_weight_decay=step.decoupled_weight_decay,
        rounding_keys=step.rounding_keys,
    )
    moment_update(weight, None, accumulator, gradient.rows, gradient.values, row_step, Moments(eps=step.eps))
