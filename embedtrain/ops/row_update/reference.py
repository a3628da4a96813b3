"""Row updates in plain PyTorch: the definition. In float32, results equal those of `torch.optim`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend.stochastic_rounding import round_to_bfloat16
from embedtrain.ops.row_update.types import Direction, Moments, RowStep


def row_update(
    weight: Tensor,
    states: Sequence[Tensor],
    rows: Tensor,
    row_grad: Tensor,
    step: RowStep,
    direction: Direction,
    first_correction: float = 1.0,
) -> None:
    """See `embedtrain.ops.row_update`."""
    row = weight[rows].float()
    grad = row_grad * step.grad_factor
    if step.max_row_grad_norm < math.inf:
        grad = grad * _factor_to(step.max_row_grad_norm, grad)
    if step.coupled_decay:
        grad = grad.add(row, alpha=step.coupled_decay)
    touched = [state[rows] for state in states]
    taken = direction(grad, touched)
    for state, new in zip(states, touched, strict=True):
        state[rows] = new
    if step.row_factor != 1.0:
        row = row * step.row_factor
    size = step.lr / first_correction
    row = row.addcdiv(*taken, value=-size) if isinstance(taken, tuple) else row.add(taken, alpha=-size)
    if step.max_norm < math.inf:
        row = row * _factor_to(step.max_norm, row)
    weight[rows] = row if step.rounding_keys is None else round_to_bfloat16(row, step.rounding_keys)


def moment_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    rows: Tensor,
    row_grad: Tensor,
    step: RowStep,
    moments: Moments,
) -> None:
    """See `embedtrain.ops.row_update`."""

    def direction(grad: Tensor, states: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        numerator = grad if first is None else states[0].lerp_(grad, 1.0 - moments.first_decay)
        if second is None:
            return numerator
        state = states[-1].mul_(moments.second_decay)
        if state.dim() == 2:
            state.addcmul_(grad, grad, value=moments.second_gain)
        else:
            state.add_(grad.square().mean(dim=1), alpha=moments.second_gain)
        root = (state.sqrt() / moments.second_correction).add_(moments.eps)
        return numerator, root if root.dim() == 2 else root.unsqueeze(1)

    states = [state for state in (first, second) if state is not None]
    row_update(weight, states, rows, row_grad, step, direction, moments.first_correction)


def _factor_to(max_norm: float, values: Tensor) -> Tensor:
    """Returns [n, 1]: the factor that scales each row down to an L2 norm; 1 if its norm is not larger."""
    norms = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    factors: Tensor = max_norm / norms.clamp(min=max_norm)
    return factors
