"""Calls the native sort kernel."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.sort_unique.types import SortedKeys


def sort_unique(keys: Tensor, largest: int, with_inverse: bool) -> SortedKeys:
    """See `embedtrain.ops.sort_unique`."""
    keys = keys.contiguous()
    n = keys.numel()
    unique, starts = empty_buffer(n + 1, dtype=torch.int64), empty_buffer(n + 1, dtype=torch.int64)
    # The sort writes the inverse or the order. Most callers of the inverse need no order; `order_of` computes it.
    positions = empty_buffer(n, dtype=torch.int64)
    address = positions.data_ptr()
    num_distinct, num_outside = ctypes.c_int64(), ctypes.c_int64()
    library.get().embedtrain_sort_unique(
        keys.data_ptr(),
        n,
        largest,
        torch.get_num_threads(),
        unique.data_ptr(),
        starts.data_ptr(),
        None if with_inverse else address,
        address if with_inverse else None,
        ctypes.addressof(num_distinct),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise library.outside_error("keys", keys, largest + 1)
    unique, starts = unique[: num_distinct.value], starts[: num_distinct.value + 1]
    if with_inverse:
        return SortedKeys(unique, starts, functools.partial(order_of, positions, starts), positions)
    return SortedKeys(unique, starts, positions, None)


def order_of(inverse: Tensor, starts: Tensor) -> Tensor:
    """Returns `SortedKeys.order`.

    Raises:
        IndexError: the inverse and the starts do not belong together.
    """
    inverse, starts = inverse.contiguous(), starts.contiguous()
    order = empty_buffer(inverse.numel(), dtype=torch.int64)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_order_of_inverse(
        inverse.data_ptr(),
        inverse.numel(),
        starts.data_ptr(),
        starts.numel() - 1,
        order.data_ptr(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise IndexError(f"the inverse of {inverse.numel()} keys does not belong to these {starts.numel() - 1} keys")
    return order
