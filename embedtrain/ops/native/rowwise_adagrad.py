"""Calls the native row-wise Adagrad kernel."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from embedtrain.ops.native import library
from embedtrain.ops.rowwise_adagrad import RowwiseAdagradStep


def rowwise_adagrad(
    weight: Tensor, accumulator: Tensor, rows: Tensor, row_grad: Tensor, step: RowwiseAdagradStep
) -> None:
    """See `embedtrain.ops.rowwise_adagrad`.

    Raises:
        ValueError: the weight or the accumulator is not contiguous: the kernel writes them in place.
        IndexError: a row lies outside the weight.
    """
    if not (weight.is_contiguous() and accumulator.is_contiguous()):
        raise ValueError("weight and accumulator must be contiguous")
    rows, row_grad = rows.contiguous(), row_grad.contiguous()
    keys = None if step.rounding_keys is None else step.rounding_keys.contiguous()
    num_outside = ctypes.c_int64()
    library.get().embedtrain_rowwise_adagrad(
        *(tensor.data_ptr() for tensor in (weight, accumulator, rows, row_grad)),
        rows.numel(),
        *weight.shape,
        step.lr,
        step.eps,
        step.weight_decay,
        int(step.decoupled_weight_decay),
        None if keys is None else keys.data_ptr(),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise IndexError(f"rows must lie in [0, {weight.shape[0]}), got {int(rows.min())} to {int(rows.max())}")
