"""The weighted sum of the outer products of rows with themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.weighted_square import native, reference

__all__ = ["weighted_square"]


def weighted_square(source: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Returns `sum(weights[i] * source[rows[i]] source[rows[i]]')`.

    Args:
        source: [num_rows, dim] float32 or bfloat16.
        rows: [n] int64.
        weights: [n] float32, not negative: the native kernel takes their square roots.

    Returns:
        [dim, dim] float32; symmetric up to rounding. The native kernel's result is exactly symmetric and does not
        depend on the number of threads.

    Raises:
        ValueError: shapes or dtypes disagree.
        IndexError: a row is out of range. Not checked on a GPU, because it would need a device sync.
    """
    if source.dim() != 2 or source.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"expected source [num_rows, dim] float32 or bfloat16, got {source.dtype} {tuple(source.shape)}"
        )
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"expected rows [n] int64, got {rows.dtype} {tuple(rows.shape)}")
    if weights.shape != rows.shape or weights.dtype != torch.float32:
        raise ValueError(f"expected weights [{rows.numel()}] float32, got {weights.dtype} {tuple(weights.shape)}")
    if dispatch.uses_native(source):
        return native.weighted_square(source, rows, weights)
    return reference.weighted_square(source, rows, weights)
