"""Calls the native kernels that update rows by running moments."""

from __future__ import annotations

import ctypes
import math
from array import array

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops.damp_rows import Damping
from embedtrain.ops.pool_rows.native import check_lengths
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_update.terms import SortedTerms, sort_terms
from embedtrain.ops.row_update.types import Moments, RowStep

_NO_SECOND, _SECOND_OF_ROW, _SECOND_OF_ELEMENT = range(3)

_COEFFICIENTS = library.array_code(
    "EmbedtrainCoefficients",
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
_DAMPING = library.array_code(
    "EmbedtrainDamping", "tables", "times", "curvatures", "directions", "num_tables", "num_directions"
)
_GRADIENT = library.array_code(
    "EmbedtrainGradient", "rows", "summed", "features", "order", "starts", "num_touched", "num_features", "num_values"
)
_DIRECTIONS_AT_ONCE = 4
"""The kernels take a multiple of this number of directions."""


def moment_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    gradient: RowGradient,
    step: RowStep,
    moments: Moments,
) -> None:
    """See `embedtrain.ops.row_update`.

    Raises:
        ValueError: the weight or a state is not contiguous, which the kernels need to write in place.
        IndexError: a row or a table of the damping is out of range; then nothing is updated.
    """
    if not all([tensor is None or tensor.is_contiguous() for tensor in (weight, first, second)]):
        raise ValueError("weight and states must be contiguous")
    if first is None and second is not None and second.dim() == 1 and _is_rowwise_adagrad(step, moments):
        # Rounding keys and damping have an entry for each distinct row, so that kernel takes the gradient by row.
        is_by_row = gradient.is_summed or step.rounding_keys is not None or gradient.damping is not None
        terms = None if is_by_row else sort_terms(gradient)
        if terms is None:
            _rowwise_adagrad(weight, second, gradient, step, moments.eps)
        else:
            _rowwise_adagrad_of_terms(weight, second, terms, gradient, step, moments.eps)
        return
    kind = _NO_SECOND if second is None else (_SECOND_OF_ROW if second.dim() == 1 else _SECOND_OF_ELEMENT)
    described, kept = _described(gradient)
    keys = _rounding_keys(gradient, step)
    damping, described_damping = _described_damping(gradient.damping)
    coefficients = array(
        _COEFFICIENTS,
        (
            step.lr / moments.first_correction,
            float(step.grad_factor),
            step.max_row_grad_norm,
            step.coupled_decay,
            step.row_factor,
            step.max_norm,
            1.0 - moments.first_decay,
            moments.second_decay,
            moments.second_gain,
            moments.second_correction,
            moments.eps,
        ),
    )
    num_outside = ctypes.c_int64()
    library.get().embedtrain_moment_update(
        *(None if tensor is None else tensor.data_ptr() for tensor in (weight, first, second)),
        described.buffer_info()[0],
        gradient.factor,
        None if described_damping is None else described_damping.buffer_info()[0],
        None if keys is None else keys.data_ptr(),
        kind,
        *weight.shape,
        coefficients.buffer_info()[0],
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    del kept
    _check_outside(num_outside.value, gradient, weight, damping)


def _is_rowwise_adagrad(step: RowStep, moments: Moments) -> bool:
    """Returns whether a step is row-wise Adagrad without clipping, for which there is a faster kernel."""
    return bool(
        moments.first_correction == moments.second_decay == moments.second_gain == moments.second_correction == 1.0
        and step.grad_factor == 1.0
        and step.max_row_grad_norm == math.inf
    )


def _rowwise_adagrad(weight: Tensor, accumulator: Tensor, gradient: RowGradient, step: RowStep, eps: float) -> None:
    described, kept = _described(gradient)
    keys = _rounding_keys(gradient, step)
    damping, described_damping = _described_damping(gradient.damping)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_rowwise_adagrad(
        weight.data_ptr(),
        accumulator.data_ptr(),
        described.buffer_info()[0],
        gradient.factor,
        None if described_damping is None else described_damping.buffer_info()[0],
        *weight.shape,
        step.lr,
        eps,
        step.weight_decay,
        int(step.decoupled_weight_decay),
        step.max_norm,
        None if keys is None else keys.data_ptr(),
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    del kept
    _check_outside(num_outside.value, gradient, weight, damping)


def _rowwise_adagrad_of_terms(
    weight: Tensor, accumulator: Tensor, terms: SortedTerms, gradient: RowGradient, step: RowStep, eps: float
) -> None:
    num_outside = ctypes.c_int64()
    library.get().embedtrain_rowwise_adagrad_of_terms(
        weight.data_ptr(),
        accumulator.data_ptr(),
        weight.shape[1],
        terms.words.data_ptr(),
        terms.words.numel(),
        terms.term_bits,
        terms.features.buffer_info()[0],
        terms.num_features,
        gradient.factor,
        step.lr,
        eps,
        step.weight_decay,
        int(step.decoupled_weight_decay),
        step.max_norm,
        torch.get_num_threads(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        check_lengths(gradient.bags)


def _described(gradient: RowGradient) -> tuple[array[int], list[Tensor]]:
    """Returns the gradient before damping in the kernels' layout, and the tensors that must stay alive with it.

    The kernels sum duplicates themselves, unless the sums are known already.
    """
    rows = gradient.rows.contiguous()
    keys = gradient.unsummed_keys
    if keys is None:
        sums = gradient.sums.contiguous()
        return array(_GRADIENT, (rows.data_ptr(), sums.data_ptr(), 0, 0, 0, rows.numel(), 0, 0)), [rows, sums]
    order, starts = keys.order, keys.starts.contiguous()
    features, tensors = gradient.native_features
    words = (
        rows.data_ptr(),
        0,
        features.buffer_info()[0],
        order.data_ptr(),
        starts.data_ptr(),
        rows.numel(),
        len(gradient.bags),
        order.numel(),
    )
    return array(_GRADIENT, words), [rows, order, starts, *tensors]


def _rounding_keys(gradient: RowGradient, step: RowStep) -> Tensor | None:
    keys = step.rounding_keys
    if keys is not None and keys.shape != gradient.rows.shape:
        raise ValueError(f"expected a rounding key for each of {gradient.rows.numel()} rows, got {tuple(keys.shape)}")
    return None if keys is None else keys.contiguous()


def _described_damping(damping: Damping | None) -> tuple[Damping | None, array[int] | None]:
    """Returns the damping as the kernels take it, and its layout, which points to its tensors."""
    if damping is None:
        return None, None
    number = damping.curvatures.shape[1]
    missing = -number % _DIRECTIONS_AT_ONCE if number else _DIRECTIONS_AT_ONCE
    # A direction of curvature 0 changes nothing.
    curvatures = torch.nn.functional.pad(damping.curvatures, (0, missing))
    directions = torch.nn.functional.pad(damping.directions, (0, 0, 0, missing))
    taken = damping._replace(curvatures=curvatures, directions=directions).contiguous()
    return taken, array(_DAMPING, (*(tensor.data_ptr() for tensor in taken), *curvatures.shape))


def _check_outside(num_outside: int, gradient: RowGradient, weight: Tensor, damping: Damping | None) -> None:
    if not num_outside:
        return
    if damping is not None:
        damping.check_tables()
    check_lengths(gradient.bags)
    if bool(((gradient.rows < 0) | (gradient.rows >= weight.shape[0])).any()):
        raise library.outside_error("rows", gradient.rows, weight.shape[0])
    raise IndexError(f"the sorted rows of {gradient.rows_of_values.numel()} values were changed")
