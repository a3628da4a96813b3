"""Bags of rows summed without being gathered first, and the gradient of each distinct row."""

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
    """Pools the rows of several features, whose values lie one feature after the other.

    Args:
        source: [num_rows, dim] float32 or bfloat16.
        index: [n] int64, all in [0, num_rows); the row of each value.
        bags: the features; their values are n together.
        out: per feature [num_bags, dim] contiguous, float32 or bfloat16, which is written; None for new tensors.

    Returns:
        Per feature [num_bags, dim] float32, zeros for an empty bag; `out` if it is given.

    Raises:
        ValueError: shapes or dtypes disagree, or the lengths of a feature do not add up to its values.
        IndexError: an index lies outside the source. Triton's kernels rely on the caller: the host would wait for the
            device.
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
    grads: Sequence[Tensor | None], bags: Sequence[Bags], keys: SortedKeys, dim: int, factor: float = 1.0
) -> Tensor:
    """Sums, for each distinct row, the gradients of the bags that it is in.

    Args:
        grads: per feature [num_bags, dim] float32; None if no gradient came back.
        bags: the features, as in forward.
        keys: the rows of the values, sorted.
        dim: of the rows.
        factor: every sum is multiplied by it.

    Returns:
        [num_distinct, dim] float32; duplicates are added in order of position, whatever the number of threads.
    """
    for grad, feature in zip(grads, bags, strict=True):
        if grad is not None and (grad.shape != (feature.num_bags, dim) or grad.dtype != torch.float32):
            raise ValueError(
                f"expected a gradient [{feature.num_bags}, {dim}] float32, got {grad.dtype} {tuple(grad.shape)}"
            )
    if dispatch.uses_native(keys.order):
        return native.pool_rows_backward(grads, bags, keys, dim, factor)
    if dispatch.uses_triton(keys.order):
        from embedtrain.ops.pool_rows import triton

        return triton.pool_rows_backward(grads, bags, keys, dim, factor)
    return reference.pool_rows_backward(grads, bags, keys, dim, factor)


def grad_of_weights(source: Tensor, index: Tensor, feature: Bags, grad: Tensor) -> Tensor:
    """Returns the gradient of one feature's weights, [num_values] float32: row by row products.

    Few models learn the weights of their ids, so PyTorch does it on every device.

    Args:
        source: [num_rows, dim].
        index: [num_values] int64; the feature's.
        feature: its bags.
        grad: [num_bags, dim]; gradient of its pooled vectors.
    """
    if feature.lengths is not None:
        if feature.is_mean:
            grad = grad / feature.lengths.clamp(min=1).unsqueeze(1)
        grad = grad.repeat_interleave(feature.lengths, dim=0)
    return (source.index_select(0, index).float() * grad).sum(dim=1)
