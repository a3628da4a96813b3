"""Power iteration in plain PyTorch, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_NUM_SQUARINGS, _NUM_TURNS = 2, 8
"""Squarings of the matrix, and turns of the iteration with the result: together the 32nd power. With more squarings,
the vectors of a turn would differ in length by more than float64 can tell apart."""


def start_vectors(dim: int, number: int, device: torch.device) -> Tensor:
    """Returns cosines [dim, number] float64, which are orthogonal to no eigenvector that occurs in practice."""
    places = torch.arange(dim, dtype=torch.float64, device=device)
    return torch.cos(torch.outer(places + 0.5, places[:number] + 0.25))


def top_eigenpairs(matrices: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """See `embedtrain.ops.top_eigenpairs`."""
    num, dim = matrices.shape[:2]
    exact = matrices.double()
    power = exact
    for _ in range(_NUM_SQUARINGS):
        power = power / power.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=1e-300)[:, None, None]
        power = power @ power
    vectors = start_vectors(dim, number, matrices.device).expand(num, dim, -1)
    for _ in range(_NUM_TURNS):
        vectors = torch.linalg.qr(power @ vectors).Q
    values = (vectors * (exact @ vectors)).sum(dim=1)
    return values.float(), vectors.transpose(1, 2).float().contiguous()
