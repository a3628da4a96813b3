"""Calls the native row-wise Adagrad kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_gradient.native import SortedTerms, sort_terms
from embedtrain.ops.rowwise_adagrad import RowwiseAdagradStep


def rowwise_adagrad(weight: Tensor, accumulator: Tensor, gradient: RowGradient, step: RowwiseAdagradStep) -> None:
    """See `embedtrain.ops.rowwise_adagrad`.

    Raises:
        ValueError: the weight or the accumulator is not contiguous: the kernel writes them in place.
        IndexError: a row lies outside the weight.
    """
    if not (weight.is_contiguous() and accumulator.is_contiguous()):
        raise ValueError("weight and accumulator must be contiguous")
    # Rounding keys are of distinct rows, which the sums give.
    terms = None if gradient.is_summed or step.rounding_keys is not None else sort_terms(gradient)
    if terms is None:
        _update_rows(weight, accumulator, gradient, step)
    else:
        _update_by_terms(weight, accumulator, terms, gradient.factor, step)


def _update_rows(weight: Tensor, accumulator: Tensor, gradient: RowGradient, step: RowwiseAdagradStep) -> None:
    rows, row_grad = gradient.rows.contiguous(), gradient.values.contiguous()
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


def _update_by_terms(
    weight: Tensor, accumulator: Tensor, terms: SortedTerms, factor: float, step: RowwiseAdagradStep
) -> None:
    library.get().embedtrain_rowwise_adagrad_of_terms(
        weight.data_ptr(),
        accumulator.data_ptr(),
        weight.shape[1],
        terms.words.data_ptr(),
        terms.words.numel(),
        terms.term_bits,
        terms.features.buffer_info()[0],
        terms.num_features,
        factor,
        step.lr,
        step.eps,
        step.weight_decay,
        int(step.decoupled_weight_decay),
        torch.get_num_threads(),
    )
