"""The parameters of a row update: the options that all formulas share, and the formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

Direction = Callable[[Tensor, Sequence[Tensor]], Tensor | tuple[Tensor, Tensor]]
"""A formula. It takes gradients [n, dim] and the states of the rows, which it updates in place. It returns the update
direction, [n, dim], or its numerator and denominator. The step then computes `row -= step size * direction`."""


class RowStep(NamedTuple):
    """Holds the options that all formulas share.

    They apply in this order: scale the gradient, clip it, add the weight decay, update the row, and scale the row down
    to its largest norm.

    Attributes:
        lr: learning rate of this step.
        grad_factor: multiplies every gradient; negative to maximise. A scalar float32 tensor on the weights' device if
            the host does not know it. NaN leaves all rows and states unchanged.
        max_row_grad_norm: largest L2 norm of a row's gradient; a larger gradient is scaled down to it.
        weight_decay: L2 factor. Adds `weight_decay * row` to the gradient, or, if decoupled, subtracts
            `lr * weight_decay * row` from the row.
        decoupled_weight_decay: whether weight decay is decoupled.
        max_norm: largest L2 norm of a row after the step; a longer row is scaled down to it.
        rounding_keys: [n] int64; a key per row and step for stochastic rounding. For bfloat16 weights only.
    """

    lr: float
    grad_factor: float | Tensor = 1.0
    max_row_grad_norm: float = math.inf
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    max_norm: float = math.inf
    rounding_keys: Tensor | None = None

    def with_known_factor(self) -> RowStep | None:
        """Returns the step with `grad_factor` as a Python float, waiting for the device; None if the factor is NaN."""
        if not isinstance(self.grad_factor, Tensor):
            return self
        factor = float(self.grad_factor)
        return None if math.isnan(factor) else self._replace(grad_factor=factor)

    @property
    def coupled_decay(self) -> float:
        """Factor of the row that is added to its gradient."""
        return 0.0 if self.decoupled_weight_decay else self.weight_decay

    @property
    def row_factor(self) -> float:
        """Factor of the row after decoupled weight decay."""
        return 1.0 - self.lr * self.weight_decay if self.decoupled_weight_decay else 1.0


class Moments(NamedTuple):
    """Holds the coefficients of a formula that keeps running moments of the gradient `g`.

    The first moment is `first += (1 - first_decay) * (g - first)`; without a first moment, `first = g`. The second
    moment is `second = second_decay * second + second_gain * g * g`, per element, or with the mean of `g * g` over dim.
    Then `row -= lr / first_correction * first / (sqrt(second) / second_correction + eps)`; without a second moment,
    there is no divisor.

    Attributes:
        first_decay: decay rate of the first moment.
        first_correction: bias correction of the first moment, for its start from zero.
        second_decay: decay rate of the second moment; 1 sums.
        second_gain: factor of the squares that are added to the second moment.
        second_correction: bias correction of the root of the second moment, for its start from zero.
        eps: added outside the square root.
    """

    first_decay: float = 0.0
    first_correction: float = 1.0
    second_decay: float = 1.0
    second_gain: float = 1.0
    second_correction: float = 1.0
    eps: float = 0.0
