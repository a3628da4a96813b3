"""Updates of rows as the tests call them: with the gradients of distinct rows, and row-wise Adagrad by its scalars."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from embedtrain.ops import row_update
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_update import Moments, RowStep


@dataclass(frozen=True, kw_only=True)
class RowwiseAdagradStep:
    """The scalars of row-wise Adagrad: `state += mean(g * g)`, then `row -= lr * g / (sqrt(state) + eps)`."""

    lr: float
    eps: float
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    max_norm: float = math.inf
    rounding_keys: Tensor | None = None


def rowwise_adagrad(weight: Tensor, accumulator: Tensor, gradient: RowGradient, step: RowwiseAdagradStep) -> None:
    """Updates the rows of a gradient by row-wise Adagrad."""
    options = {name: value for name, value in vars(step).items() if name != "eps"}
    row_update.moment_update(weight, None, accumulator, gradient, RowStep(**options), Moments(eps=step.eps))


def moment_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    rows: Tensor,
    row_grad: Tensor,
    step: RowStep,
    moments: Moments,
) -> None:
    """Updates distinct rows by running moments."""
    gradient = RowGradient.of_rows(rows, row_grad, weight.shape[0])
    row_update.moment_update(weight, first, second, gradient, step, moments)
