"""Pools bags of rows without gathering the rows first, and sums the gradient of each distinct row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.pool_rows import native, reference
from embedtrain.ops.pool_rows.types import Bags
from embedtrain.ops.sort_unique import SortedKeys

__all__ = ["Bags", "grad_of_weights", "pool_rows", "pool_rows_backward"]


def pool_rows(
    source: Tensor, index: Tensor, bags: Sequence[Bags], *, out: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Sums or averages the rows of each bag of several features.

    Args:
        source: [num_rows, dim] float32 or bfloat16.
        index: [n] int64, all in [0, num_rows); the row of each value, ordered by feature and bag.
        bags: the features, with n values in total.
        out: one tensor per feature, [num_bags, dim] contiguous, float32 or bfloat16; receives the pooled vectors. None
            allocates new tensors.

    Returns:
        One tensor per feature, [num_bags, dim] float32, zeros for an empty bag; `out` if it is given.

    Raises:
        ValueError: shapes or dtypes disagree, or the lengths of a feature do not add up to its number of values.
        IndexError: an index is out of range. The Triton kernels do not check, because it would need a device sync.
    """
    num_values = sum([feature.num_values for feature in bags])
    if source.dim() != 2 or index.shape != (num_values,) or index.dtype != torch.int64:
        raise ValueError(
            f"expected source [num_rows, dim] and index [{num_values}] int64, got {tuple(source.shape)} and "
            f"{index.dtype} {tuple(index.shape)}"
        )
    if source.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"expected float32 or bfloat16 rows, got {source.dtype}")
    if out is not None:
        _check_out(out, bags, source.shape[1])
    if dispatch.uses_native(source):
        if out is None or all(vectors.dtype == torch.float32 for vectors in out):
            return native.pool_rows(source, index, bags, out)
        pooled = native.pool_rows(source, index, bags, None)
    elif dispatch.uses_triton(source):
        from embedtrain.ops.pool_rows import triton

        pooled = triton.pool_rows(source, index, bags)
    else:
        pooled = reference.pool_rows(source, index, bags)
    return pooled if out is None else [room.copy_(own) for room, own in zip(out, pooled, strict=True)]


def _check_out(out: Sequence[Tensor], bags: Sequence[Bags], dim: int) -> None:
    for room, feature in zip(out, bags, strict=True):
        if room.shape != (feature.num_bags, dim) or not room.is_contiguous():
            raise ValueError(f"expected out [{feature.num_bags}, {dim}] contiguous, got {tuple(room.shape)}")
        if room.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"expected out float32 or bfloat16, got {room.dtype}")


def pool_rows_backward(
    grads: Sequence[Tensor | None],
    bags: Sequence[Bags],
    keys: SortedKeys,
    dim: int,
    factor: float = 1.0,
    buffer: Tensor | None = None,
) -> Tensor:
    """Sums the gradients of the bags that contain a row, for each distinct row.

    Args:
        grads: one tensor per feature, [num_bags, dim] float32: the gradient of its pooled vectors. None stands for
            zeros.
        bags: the features, as in `pool_rows`.
        keys: the sorted rows of the values.
        dim: dimension of the rows.
        factor: multiplies every sum.
        buffer: [num_distinct, dim] float32, contiguous; memory that the sums may be returned in. Only the native kernel
            uses it.

    Returns:
        [num_distinct, dim] float32. Duplicates are added in order of position, for any number of threads.
    """
    for grad, feature in zip(grads, bags, strict=True):
        if grad is not None and (grad.shape != (feature.num_bags, dim) or grad.dtype != torch.float32):
            raise ValueError(
                f"expected a gradient [{feature.num_bags}, {dim}] float32, got {grad.dtype} {tuple(grad.shape)}"
            )
    if dispatch.uses_native(keys.order):
        return native.pool_rows_backward(grads, bags, keys, dim, factor, buffer)
    if dispatch.uses_triton(keys.order):
        from embedtrain.ops.pool_rows import triton

        return triton.pool_rows_backward(grads, bags, keys, dim, factor)
    return reference.pool_rows_backward(grads, bags, keys, dim, factor)


def grad_of_weights(source: Tensor, index: Tensor, feature: Bags, grad: Tensor) -> Tensor:
    """Returns the gradient of one feature's weights, [num_values] float32.

    Few models learn these weights, so there is only a PyTorch implementation for all devices.

    Args:
        source: [num_rows, dim].
        index: [num_values] int64; the row of each value of the feature.
        feature: the bags of the feature.
        grad: [num_bags, dim]; the gradient of the feature's pooled vectors.
    """
    if feature.lengths is not None:
        if feature.is_mean:
            grad = grad / feature.lengths.clamp(min=1).unsqueeze(1)
        grad = grad.repeat_interleave(feature.lengths, dim=0)
    return (source.index_select(0, index).float() * grad).sum(dim=1)
