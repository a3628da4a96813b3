"""Calls the native kernel of weighted squares."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from embedtrain.ops._backend import library


def weighted_square(source: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """See `embedtrain.ops.weighted_square`."""
    source, rows, weights = source.contiguous(), rows.contiguous(), weights.contiguous()
    dim = source.shape[1]
    result = torch.empty(dim, dim, dtype=torch.float32)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_weighted_square(
        source.data_ptr(),
        source.shape[0],
        int(source.dtype == torch.bfloat16),
        rows.data_ptr(),
        weights.data_ptr(),
        rows.numel(),
        dim,
        result.data_ptr(),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise library.outside_error("rows", rows, source.shape[0])
    return result
