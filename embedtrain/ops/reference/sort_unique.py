"""Distinct keys by PyTorch's sort."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops.sort_unique import SortedKeys


def sort_unique(keys: Tensor, with_inverse: bool) -> SortedKeys:
    """See `embedtrain.ops.sort_unique`."""
    ascending, order = torch.sort(keys, stable=True)
    unique, place, counts = torch.unique_consecutive(ascending, return_inverse=True, return_counts=True)
    starts = torch.zeros(unique.numel() + 1, dtype=torch.int64, device=keys.device)
    torch.cumsum(counts, 0, out=starts[1:])
    inverse = torch.empty_like(keys).index_copy_(0, order, place) if with_inverse else None
    return SortedKeys(unique, starts, order, inverse)
