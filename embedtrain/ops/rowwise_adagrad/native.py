"""Calls the native row-wise Adagrad kernels."""

from __future__ import annotations

import ctypes
import itertools
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.rowwise_adagrad.types import RowwiseAdagradStep

_MAX_WORD_BITS = 64


class SortedTerms(NamedTuple):
    """The gradients' terms in order of row.

    Attributes:
        words: [n] int64; `row << term_bits | term`, one a value. A term is a bag, or a value where bags are weighted.
        term_bits: how many bits a term takes.
        features: the gradient's `native_features`.
        num_features: how many there are.
    """

    words: Tensor
    term_bits: int
    features: array[int]
    num_features: int


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


def sort_terms(gradient: RowGradient) -> SortedTerms | None:
    """Sorts the terms by row; None where a row and a term do not fit into a word.

    Raises:
        IndexError: a row lies outside the table.
    """
    bags, rows = gradient.bags, gradient.rows_of_values.contiguous()
    num_terms = sum(feature.num_values if feature.weights is not None else feature.num_bags for feature in bags)
    term_bits = max(num_terms - 1, 0).bit_length()
    if gradient.num_rows.bit_length() + term_bits > _MAX_WORD_BITS:
        return None
    features, _ = gradient.native_features
    runs = array("q", [*itertools.chain.from_iterable(gradient.runs)] or (rows.numel(), 0, gradient.num_rows))
    words = empty_buffer(rows.numel(), dtype=torch.int64)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_sort_terms(
        rows.data_ptr(),
        rows.numel(),
        features.buffer_info()[0],
        len(bags),
        runs.buffer_info()[0],
        len(runs) // 3,
        gradient.num_rows,
        term_bits,
        torch.get_num_threads(),
        words.data_ptr(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise IndexError(f"rows must lie in [0, {gradient.num_rows}), got {int(rows.min())} to {int(rows.max())}")
    return SortedTerms(words, term_bits, features, len(bags))
