"""Distinct keys in plain PyTorch."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from embedtrain.ops.sort_unique.types import OrderedKeys, SortedKeys


def sort_unique(keys: Tensor, with_inverse: bool) -> SortedKeys:
    """See `embedtrain.ops.sort_unique`."""
    ordered = OrderedKeys(keys)
    return replace(ordered.sorted, inverse=ordered.inverse) if with_inverse else ordered.sorted
