"""Damping of gradients in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def damp_rows(grad: Tensor, tables: Tensor, times: Tensor, curvatures: Tensor, directions: Tensor) -> Tensor:
    """See `embedtrain.ops.damp_rows`."""
    x = times.unsqueeze(1) * curvatures.clamp(min=0)[tables]  # [n, k]
    excess = torch.where(x > 0, -torch.expm1(-x) / x - 1, 0.0)
    damped = grad.clone()
    for table in range(len(curvatures)):
        rows = (tables == table).nonzero().flatten()
        vectors = directions[table]
        along = grad[rows] @ vectors.T  # [m, k]
        damped[rows] += (excess[rows] * along) @ vectors
    return damped
