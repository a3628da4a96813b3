"""Segment sums by the native pooling kernel: every row is a bag of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from embedtrain.ops.native.pool_rows import pool_rows_backward
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.sort_unique import SortedKeys


def segment_sum(parts: Sequence[Tensor], keys: SortedKeys, factor: float) -> Tensor:
    """See `embedtrain.ops.segment_sum`."""
    bags = [Bags(part.shape[0]) for part in parts]
    return pool_rows_backward(parts, bags, keys, parts[0].shape[1], factor)
