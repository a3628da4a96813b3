"""Calls the native pooling kernels."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import buffer_for, empty_buffer
from embedtrain.ops.pool_rows.types import Bags
from embedtrain.ops.sort_unique import SortedKeys

_FEATURE = library.array_code(
    "EmbedtrainFeature", "lengths", "weights", "vectors", "row_stride", "num_bags", "num_values", "is_mean"
)


def pool_rows(source: Tensor, index: Tensor, bags: Sequence[Bags], out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """See `embedtrain.ops.pool_rows`."""
    source, index = source.contiguous(), index.contiguous()
    dim = source.shape[1]
    pooled = empty_vectors(bags, dim) if out is None else list(out)
    table, kept = describe(bags, pooled)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_pool_rows(
        source.data_ptr(),
        source.shape[0],
        int(source.dtype == torch.bfloat16),
        dim,
        index.data_ptr(),
        index.numel(),
        table.buffer_info()[0],
        len(bags),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    del kept
    if num_outside.value:
        check_lengths(bags)
        raise library.outside_error("rows", index, source.shape[0])
    return pooled


def pool_rows_backward(
    grads: Sequence[Tensor | None],
    bags: Sequence[Bags],
    keys: SortedKeys,
    dim: int,
    factor: float = 1.0,
    buffer: Tensor | None = None,
) -> Tensor:
    """See `embedtrain.ops.pool_rows`."""
    table, kept = describe(bags, grads)
    summed = buffer_for(buffer, keys.unique.numel(), dim)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_pool_rows_backward(
        dim,
        keys.order.data_ptr(),
        keys.starts.data_ptr(),
        keys.unique.numel(),
        keys.order.numel(),
        table.buffer_info()[0],
        len(bags),
        factor,
        summed.data_ptr(),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    del kept
    if num_outside.value:
        check_lengths(bags)
        num_values = sum(feature.num_values for feature in bags)
        raise IndexError(f"expected the sorted keys of {num_values} values, got {keys.order.numel()} keys")
    return summed


def empty_vectors(bags: Sequence[Bags], dim: int) -> list[Tensor]:
    """Returns uninitialised memory for the pooled vectors of each feature, [num_bags, dim] float32."""
    if len(bags) == 1:
        return [empty_buffer(bags[0].num_bags, dim)]
    together = empty_buffer(sum(feature.num_bags for feature in bags), dim)
    # Autograd does not treat `data` as a view, so the caller may change one feature's vectors in place.
    return [part.data for part in together.split([feature.num_bags for feature in bags])]


def check_lengths(bags: Sequence[Bags]) -> None:
    """Raises ValueError if the lengths of a feature do not add up to its values, for instance after an overwrite."""
    for number, feature in enumerate(bags):
        lengths = feature.lengths
        if lengths is not None and (int(lengths.sum()) != feature.num_values or bool((lengths < 0).any())):
            raise ValueError(
                f"the lengths of feature {number} must not be negative and must add up to {feature.num_values}, got a "
                f"sum of {int(lengths.sum())} and a minimum of {int(lengths.min()) if len(lengths) else 0}"
            )


def describe(bags: Sequence[Bags], vectors: Sequence[Tensor | None]) -> tuple[array[int], list[Tensor]]:
    """Returns the features as an array of `EmbedtrainFeature`, and the vectors that the caller must keep alive."""
    words: list[int] = []
    kept: list[Tensor] = []
    for feature, rows in zip(bags, vectors, strict=True):
        lengths = 0 if feature.lengths is None else feature.lengths.data_ptr()
        weights = 0 if feature.weights is None else feature.weights.data_ptr()
        row_address = row_stride = 0
        if rows is not None:
            row_stride, column_stride = rows.stride()
            # The kernel takes any row stride but needs adjacent columns. The gradient of `sum()`, for instance, has
            # strides of zero.
            if column_stride != 1 and rows.shape[1] != 1:
                rows = rows.contiguous()
                row_stride = rows.stride(0)
            kept.append(rows)
            row_address = rows.data_ptr()
        words += (lengths, weights, row_address, row_stride, feature.num_bags, feature.num_values, feature.is_mean)
    return array(_FEATURE, words), kept
