"""Segment sums by the Triton kernel that sums over runs."""

from __future__ import annotations

from torch import Tensor

from embedtrain.ops._backend.triton_runs import sum_runs
from embedtrain.ops.sort_unique import SortedKeys


def segment_sum(values: Tensor, keys: SortedKeys, factor: float) -> Tensor:
    """See `embedtrain.ops.segment_sum`."""
    return sum_runs(values.contiguous(), keys.order, keys.starts, factor=factor, has_empty_runs=keys.is_padded)
