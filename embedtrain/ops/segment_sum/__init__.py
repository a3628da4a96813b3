"""Sums rows that share a key."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.segment_sum import native, reference
from embedtrain.ops.sort_unique import SortedKeys


def segment_sum(values: Tensor, keys: SortedKeys, factor: float = 1.0) -> Tensor:
    """Sums the rows of each distinct key.

    Args:
        values: [n, dim] float32; one row per key.
        keys: the sorted keys.
        factor: multiplies every sum.

    Returns:
        [num_distinct, dim] float32. Rows are added in order of position, for any number of threads.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    if values.dim() != 2 or values.shape[0] != keys.order.numel() or values.dtype != torch.float32:
        raise ValueError(
            f"expected values [{keys.order.numel()}, dim] float32, got {values.dtype} {tuple(values.shape)}"
        )
    if dispatch.uses_native(values):
        return native.segment_sum(values, keys, factor)
    if dispatch.uses_triton(values):
        from embedtrain.ops.segment_sum import triton

        return triton.segment_sum(values, keys, factor)
    return reference.segment_sum(values, keys, factor)
