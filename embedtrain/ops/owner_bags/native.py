"""Calls the native kernels that split bags by owner."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.owner_bags.types import SplitBags
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.pool_rows.native import check_lengths, describe, empty_vectors

_PART = library.array_code("EmbedtrainPart", "rows", "num_rows")


def split_bags(
    keys: Tensor, bags: Sequence[Bags], num_owners: int, num_local_rows: int, dtype: torch.dtype
) -> SplitBags:
    """See `embedtrain.ops.owner_bags`."""
    keys = keys.contiguous()
    n = keys.numel()
    is_weighted = any(feature.weights is not None for feature in bags)
    table, kept = describe(bags, [None] * len(bags))
    rows, bag_of_sum = empty_buffer(n, dtype=dtype), empty_buffer(n, dtype=torch.int64)
    weights = empty_buffer(n) if is_weighted else None
    id_counts, sum_counts = torch.empty(2, num_owners, dtype=torch.int64)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_split_bags(
        keys.data_ptr(),
        n,
        table.buffer_info()[0],
        len(bags),
        num_owners,
        num_local_rows,
        torch.get_num_threads(),
        int(dtype == torch.int32),
        rows.data_ptr(),
        None if weights is None else weights.data_ptr(),
        bag_of_sum.data_ptr(),
        id_counts.data_ptr(),
        sum_counts.data_ptr(),
        ctypes.addressof(num_outside),
    )
    del kept
    if num_outside.value:
        check_lengths(bags)
        bound = num_owners * num_local_rows
        raise library.outside_error("keys", keys, bound)
    return SplitBags(rows, weights, bag_of_sum[: int(sum_counts.sum())], id_counts, sum_counts)


def join_bags(rows: Tensor, num_bags: int) -> tuple[Tensor, Tensor]:
    """See `embedtrain.ops.owner_bags`."""
    rows = rows.contiguous()
    joined, lengths = (empty_buffer(count, dtype=torch.int64) for count in (rows.numel(), num_bags + 1))
    num_outside = ctypes.c_int64()
    library.get().embedtrain_join_bags(
        rows.data_ptr(),
        int(rows.dtype == torch.int32),
        rows.numel(),
        num_bags,
        joined.data_ptr(),
        lengths.data_ptr(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise ValueError(f"expected {num_bags} bags, got {int((rows < 0).sum())}")
    return joined, lengths[:num_bags]


def add_sums(parts: Sequence[Tensor], bag_of_sum: Tensor, bags: Sequence[Bags]) -> list[Tensor]:
    """See `embedtrain.ops.owner_bags`."""
    dim, bag_of_sum = parts[0].shape[1], bag_of_sum.contiguous()
    pooled = empty_vectors(bags, dim)
    table, kept = describe(bags, pooled)
    words, kept_parts = _describe_parts(parts)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_add_sums(
        words.buffer_info()[0],
        len(parts),
        int(parts[0].dtype == torch.bfloat16),
        dim,
        bag_of_sum.data_ptr(),
        table.buffer_info()[0],
        len(bags),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    del kept, kept_parts
    _check_bags(num_outside.value, bag_of_sum, bags)
    return pooled


def share_out(grads: Sequence[Tensor | None], bags: Sequence[Bags], bag_of_sum: Tensor, out: Sequence[Tensor]) -> None:
    """See `embedtrain.ops.owner_bags`."""
    dim, bag_of_sum = out[0].shape[1], bag_of_sum.contiguous()
    is_written = out[0].dtype == torch.float32 and all(part.is_contiguous() for part in out)
    written = out if is_written else [empty_buffer(*part.shape) for part in out]
    table, kept = describe(bags, grads)
    words, kept_parts = _describe_parts(written)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_share_out(
        table.buffer_info()[0],
        len(bags),
        dim,
        bag_of_sum.data_ptr(),
        words.buffer_info()[0],
        len(written),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    del kept, kept_parts
    _check_bags(num_outside.value, bag_of_sum, bags)
    if not is_written:
        for part, own in zip(out, written, strict=True):
            part.copy_(own)


def _describe_parts(parts: Sequence[Tensor]) -> tuple[array[int], list[Tensor]]:
    """Returns the parts as an array of `EmbedtrainPart`, and the tensors that the caller must keep alive."""
    kept = [part.contiguous() for part in parts]
    return array(_PART, [word for part in kept for word in (part.data_ptr(), len(part))]), kept


def _check_bags(num_outside: int, bag_of_sum: Tensor, bags: Sequence[Bags]) -> None:
    if num_outside:
        num_bags = sum(feature.num_bags for feature in bags)
        raise IndexError(
            f"expected bags in [0, {num_bags}), ascending for each owner, got {int(bag_of_sum.min())} to "
            f"{int(bag_of_sum.max())}"
        )
