"""Sums of the rows that share a key."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops import dispatch
from embedtrain.ops.sort_unique import SortedKeys


def segment_sum(parts: Sequence[Tensor], keys: SortedKeys, factor: float = 1.0) -> Tensor:
    """Adds up the rows of each distinct key.

    Args:
        parts: each [m, dim] float32, together a row per key, one part after the other.
        keys: the sorted keys.
        factor: of every sum.

    Returns:
        [num_distinct, dim] float32; rows are added in order of position, whatever the number of threads.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    if {(part.dim(), part.dtype) for part in parts} != {(2, torch.float32)} or len({p.shape[1] for p in parts}) != 1:
        raise ValueError(f"expected parts [m, dim] float32, got {[(part.dtype, tuple(part.shape)) for part in parts]}")
    if sum(part.shape[0] for part in parts) != keys.order.numel():
        raise ValueError(f"expected {keys.order.numel()} rows, got {[part.shape[0] for part in parts]}")
    if dispatch.uses_native(parts[0]):
        from embedtrain.ops.native import segment_sum as native

        return native.segment_sum(parts, keys, factor)
    from embedtrain.ops.reference import segment_sum as reference

    return reference.segment_sum(torch.cat(list(parts)), keys, factor)
