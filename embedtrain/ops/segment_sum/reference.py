"""Segment sums in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops.sort_unique import SortedKeys


def segment_sum(values: Tensor, keys: SortedKeys, factor: float) -> Tensor:
    """See `embedtrain.ops.segment_sum`."""
    counts = keys.starts.diff()
    distinct = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    sums = values.new_zeros(counts.numel(), values.shape[1]).index_add_(0, distinct, values[keys.order])
    return sums if factor == 1.0 else sums * factor
