"""Decides on the device whether a step may be applied, so that the host need not wait."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.ops._backend.transfer import HostCopy
from embedtrain.ops.row_gradient import RowGradient


class Watched(NamedTuple):
    """Holds values other than row gradients that must be finite for a step to be applied.

    Attributes:
        values: the values, of any shape.
        explain: returns an error message about the values, or None if they are finite.
    """

    values: Tensor
    explain: Callable[[], str | None]


class PendingVerdict:
    """Copies to the host whether a step was applied, while the device goes on.

    Args:
        total: scalar float64; the result of `total_on_device`, summed over the ranks.
        gradients: gradients of the step, for the error message.
        veto: why this rank refused the step; None if it did not.
        watched: other values of this rank that must be finite.
    """

    def __init__(
        self, total: Tensor, gradients: Sequence[RowGradient], veto: str | None, watched: Sequence[Watched]
    ) -> None:
        self.gradients = gradients
        self._veto, self._watched = veto, watched
        self._total = HostCopy(total)

    @property
    def arrived(self) -> torch.cuda.Event | None:
        """The event after which the host can read the result without waiting; None on the CPU."""
        return self._total.arrived

    def is_finite(self) -> bool:
        """Returns whether the step was applied; waits for the device if necessary."""
        return math.isfinite(self._total.item())

    def reason(self) -> str | None:
        """See `reason_of`."""
        return reason_of(self._veto, self._watched)


def reason_of(veto: str | None, watched: Sequence[Watched]) -> str | None:
    """Returns why this rank refuses a step apart from its gradients, such as a loss that is not finite; else None."""
    if veto is None:
        for each in watched:
            if (reason := each.explain()) is not None:
                return reason
    return veto


def reason_of_loss(loss: Tensor) -> str | None:
    """Returns an error message if a loss is not finite, else None."""
    return None if math.isfinite(total := float(loss)) else f"the loss is {total}"


def total_on_device(gradients: Sequence[RowGradient], watched: Sequence[Watched], *, is_norm_wanted: bool) -> Tensor:
    """Returns this rank's term of a sum over the ranks that is not finite if any gradient or watched value is not.

    Args:
        gradients: gradients of the step.
        watched: other values that must be finite.
        is_norm_wanted: whether the sum must be the sum of squares of the gradients; otherwise it is zero if finite.

    Returns:
        Scalar float64.
    """
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for gradient in gradients:
        if gradient.values.numel():
            # In float64 the square of a finite float32 is finite.
            part = torch.linalg.vector_norm(
                gradient.values, ord=2 if is_norm_wanted else math.inf, dtype=torch.float64 if is_norm_wanted else None
            ).double()
            total += part.square()
    for each in watched:
        total += (each.values.detach() * 0.0).sum()  # times zero, because a sum of finite values can overflow
    return total if is_norm_wanted else total * 0.0


def factor_on_device(total: Tensor, max_grad_norm: float | None) -> Tensor:
    """Returns the factor for all gradients, scalar float32; NaN, which skips the step, if the total is not finite."""
    factor = total * 0.0 + 1.0  # infinity * 0 is NaN too
    if max_grad_norm is not None:
        factor = factor * (max_grad_norm / total.sqrt()).clamp(max=1.0)
    return factor.float()
