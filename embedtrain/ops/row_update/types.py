"""What an update of rows is given: the options that all formulas have in common, and a formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

Direction = Callable[[Tensor, Sequence[Tensor]], Tensor | tuple[Tensor, Tensor]]
"""A formula: takes gradients [n, dim] and the rows' states, which it updates in place; returns what is taken from the
rows times the step size, [n, dim], or its numerator and denominator."""


class RowStep(NamedTuple):
    """What every formula has in common. In this order: the gradient is scaled, clipped, decayed; the row is stepped
    and brought below its largest norm.

    Attributes:
        lr: learning rate of this step.
        grad_factor: multiplies every gradient; negative if the objective is maximised. It is a scalar float32 on the
            weights' device if the host does not know it; NaN leaves all rows and states as they are.
        max_row_grad_norm: gradients of larger L2 norm are scaled down to it, each row's by itself.
        weight_decay: L2 factor; added to the gradient as `weight_decay * row`, or, decoupled, taken from the
            row itself as `lr * weight_decay * row`.
        decoupled_weight_decay: which of the two.
        max_norm: rows of larger L2 norm are scaled down to it after the step.
        rounding_keys: [n] int64 for bfloat16 weights: a key per row and step for stochastic rounding.
    """

    lr: float
    grad_factor: float | Tensor = 1.0
    max_row_grad_norm: float = math.inf
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    max_norm: float = math.inf
    rounding_keys: Tensor | None = None

    def with_known_factor(self) -> RowStep | None:
        """Returns the step with a factor that the host knows, for which it waits; None for one that changes nothing."""
        if not isinstance(self.grad_factor, Tensor):
            return self
        factor = float(self.grad_factor)
        return None if math.isnan(factor) else self._replace(grad_factor=factor)

    @property
    def coupled_decay(self) -> float:
        """The share of a row that is added to its gradient."""
        return 0.0 if self.decoupled_weight_decay else self.weight_decay

    @property
    def row_factor(self) -> float:
        """The share of a row that decoupled decay leaves."""
        return 1.0 - self.lr * self.weight_decay if self.decoupled_weight_decay else 1.0


class Moments(NamedTuple):
    """The coefficients of running moments of the gradient `g`.

    `first += (1 - first_decay) * (g - first)` if a first moment is kept, else `first = g`. `second = second_decay *
    second + second_gain * g * g`, of every element, or of the mean over dim. Then
    `row -= lr / first_correction * first / (sqrt(second) / second_correction + eps)`, without the divisor if no second
    moment is kept.

    Attributes:
        first_decay: share of the first moment that is kept.
        first_correction: corrects the first moment for its start from zero.
        second_decay: share of the second moment that is kept; 1 sums.
        second_gain: factor of the squares that are added to the second moment.
        second_correction: corrects the root of the second moment for its start from zero.
        eps: added outside the root.
    """

    first_decay: float = 0.0
    first_correction: float = 1.0
    second_decay: float = 1.0
    second_gain: float = 1.0
    second_correction: float = 1.0
    eps: float = 0.0
