"""Calls the native damping kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import empty_buffer


def damp_rows(grad: Tensor, tables: Tensor, times: Tensor, curvatures: Tensor, directions: Tensor) -> Tensor:
    """See `embedtrain.ops.damp_rows`."""
    grad, tables, times = grad.contiguous(), tables.contiguous(), times.contiguous()
    curvatures, directions = curvatures.contiguous(), directions.contiguous()
    damped = empty_buffer(*grad.shape, dtype=torch.float32)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_damp_rows(
        *(tensor.data_ptr() for tensor in (grad, tables, times, curvatures, directions)),
        *grad.shape,
        *curvatures.shape,
        damped.data_ptr(),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        found = f"{int(tables.min())} to {int(tables.max())}"
        raise IndexError(f"tables must lie in [0, {curvatures.shape[0]}), got {found}")
    return damped
