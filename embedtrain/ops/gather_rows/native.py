"""Calls the native gather kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import empty_buffer


def gather_rows(source: Tensor, rows: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """See `embedtrain.ops.gather_rows`."""
    source, rows = source.contiguous(), rows.contiguous()
    if out is not None and not out.is_contiguous():
        raise ValueError("out must be contiguous")
    gathered = empty_buffer(rows.numel(), source.shape[1], dtype=dtype) if out is None else out
    num_outside = ctypes.c_int64()
    library.get().embedtrain_gather_rows(
        source.data_ptr(),
        source.shape[0],
        int(source.dtype == torch.bfloat16),
        rows.data_ptr(),
        *gathered.shape,
        gathered.data_ptr(),
        int(dtype == torch.bfloat16),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise library.outside_error("rows", rows, source.shape[0])
    return gathered
