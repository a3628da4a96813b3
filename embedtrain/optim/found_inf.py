"""Whether a step may be applied, decided on the device, so that the host need not wait for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.ops._backend.transfer import HostCopy
from embedtrain.ops.row_gradient import RowGradient


class Watched(NamedTuple):
    """Numbers beside the gradients of rows that must be finite for a step to be applied.

    Attributes:
        values: any shape.
        explain: returns what is wrong with them, or None.
    """

    values: Tensor
    explain: Callable[[], str | None]


class PendingVerdict:
    """What the ranks agreed on for a step, on its way to the host while the device goes on.

    Args:
        total: scalar float64; see `total_on_device`, summed over the ranks.
        gradients: of the step, to say what was wrong with them.
        veto: why this rank wanted no step; None if it wanted one.
        watched: what else must be finite.
    """

    def __init__(
        self, total: Tensor, gradients: Sequence[RowGradient], veto: str | None, watched: Sequence[Watched]
    ) -> None:
        self.gradients = gradients
        self._veto, self._watched = veto, watched
        self._total = HostCopy(total)

    @property
    def arrived(self) -> torch.cuda.Event | None:
        """When the host can know; None on the CPU."""
        return self._total.arrived

    def is_finite(self) -> bool:
        """Returns whether the step was applied; waits for the device if it has not come that far."""
        return math.isfinite(self._total.item())

    def reason(self) -> str | None:
        """See `reason_of`."""
        return reason_of(self._veto, self._watched)


def reason_of(veto: str | None, watched: Sequence[Watched]) -> str | None:
    """Returns why this rank refuses a step whatever its gradients, such as a loss that is not finite; else None."""
    if veto is None:
        for each in watched:
            if (reason := each.explain()) is not None:
                return reason
    return veto


def reason_of_loss(loss: Tensor) -> str | None:
    """Returns what is wrong with a loss, or None."""
    return None if math.isfinite(total := float(loss)) else f"the loss is {total}"


def total_on_device(gradients: Sequence[RowGradient], watched: Sequence[Watched], *, is_norm_wanted: bool) -> Tensor:
    """Returns this rank's part of what the ranks sum up, scalar float64: not finite if a value of theirs is not.

    Args:
        gradients: of the step.
        watched: what else must be finite.
        is_norm_wanted: whether it is the sum of squares of the gradients, or zero.
    """
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device)
    for gradient in gradients:
        if gradient.values.numel():
            # Float64 holds the square of any finite float32.
            part = torch.linalg.vector_norm(
                gradient.values, ord=2 if is_norm_wanted else math.inf, dtype=torch.float64 if is_norm_wanted else None
            ).double()
            total += part.square()
    for each in watched:
        total += (each.values.detach() * 0.0).sum()  # the sum of finite numbers need not be finite
    return total if is_norm_wanted else total * 0.0


def factor_on_device(total: Tensor, max_grad_norm: float | None) -> Tensor:
    """Returns the factor for all gradients, scalar float32; NaN, which leaves the step out, for a total not finite."""
    factor = total * 0.0 + 1.0  # of infinity too, NaN
    if max_grad_norm is not None:
        factor = factor * (max_grad_norm / total.sqrt()).clamp(max=1.0)
    return factor.float()
