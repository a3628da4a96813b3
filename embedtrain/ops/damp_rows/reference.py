"""Damping of gradients in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops.damp_rows.types import Damping


def damp_rows(grad: Tensor, damping: Damping) -> Tensor:
    """See `embedtrain.ops.damp_rows`."""
    tables, times, curvatures, directions = damping
    x = times.unsqueeze(1) * curvatures.clamp(min=0)[tables]  # [n, k]
    excess = torch.where(x > 0, -torch.expm1(-x) / x - 1, 0.0)
    damped = grad.clone()
    for table in range(len(curvatures)):
        rows = (tables == table).nonzero().flatten()
        vectors = directions[table]
        along = grad[rows] @ vectors.T  # [m, k]
        damped[rows] += (excess[rows] * along) @ vectors
    return damped
