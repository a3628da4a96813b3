"""The largest magnitudes of gradients in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from embedtrain.ops.pool_rows import Bags


def largest_magnitudes(bags: Sequence[Bags], grads: Sequence[Tensor | None]) -> tuple[float, float]:
    """Returns the largest magnitude of the gradients, and the largest of the weights' magnitudes and 1.

    A result is NaN if one of its inputs is NaN.
    """
    weights = [feature.weights for feature in bags]
    return _largest(grads, 0.0), _largest(weights, 1.0)


def _largest(tensors: Iterable[Tensor | None], least: float) -> float:
    found = [tensor.abs().amax() for tensor in tensors if tensor is not None and tensor.numel()]
    # `clamp` propagates NaN; Python's max does not.
    return float(torch.stack(found).amax().clamp(min=least)) if found else least
