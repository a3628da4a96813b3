"""Calls the native kernel of updates by running moments."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops.row_update.types import Moments, RowStep

_NO_SECOND, _SECOND_OF_ROW, _SECOND_OF_ELEMENT = range(3)


class _Coefficients(ctypes.Structure):
    """As `Coefficients` in moment_update.cpp."""

    _fields_ = [
        (name, ctypes.c_float)
        for name in (
            "step_size",
            "grad_factor",
            "max_row_grad_norm",
            "coupled_decay",
            "row_factor",
            "max_norm",
            "first_gain",
            "second_decay",
            "second_gain",
            "second_correction",
            "eps",
        )
    ]


def moment_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    rows: Tensor,
    row_grad: Tensor,
    step: RowStep,
    moments: Moments,
) -> None:
    """See `embedtrain.ops.row_update`.

    Raises:
        ValueError: the weight or a state is not contiguous: the kernel writes them in place.
        IndexError: a row lies outside the weight.
    """
    if not all(tensor is None or tensor.is_contiguous() for tensor in (weight, first, second)):
        raise ValueError("weight and states must be contiguous")
    kind = _NO_SECOND if second is None else (_SECOND_OF_ROW if second.dim() == 1 else _SECOND_OF_ELEMENT)
    rows, row_grad = rows.contiguous(), row_grad.contiguous()
    keys = None if step.rounding_keys is None else step.rounding_keys.contiguous()
    coefficients = _Coefficients(
        step.lr / moments.first_correction,
        step.grad_factor,
        step.max_row_grad_norm,
        step.coupled_decay,
        step.row_factor,
        step.max_norm,
        1.0 - moments.first_decay,
        moments.second_decay,
        moments.second_gain,
        moments.second_correction,
        moments.eps,
    )
    num_outside = ctypes.c_int64()
    library.get().embedtrain_moment_update(
        *(None if tensor is None else tensor.data_ptr() for tensor in (weight, first, second, rows, row_grad, keys)),
        kind,
        rows.numel(),
        *weight.shape,
        ctypes.addressof(coefficients),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise IndexError(f"rows must lie in [0, {weight.shape[0]}), got {int(rows.min())} to {int(rows.max())}")
