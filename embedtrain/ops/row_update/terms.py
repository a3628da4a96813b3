"""Sorts gradients by row, for native updates that sum gradients while they update rows."""

from __future__ import annotations

import ctypes
import itertools
from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.pool_rows.native import check_lengths
from embedtrain.ops.row_gradient import RowGradient, Run

_MAX_WORD_BITS = 64
_RUN = library.array_code("EmbedtrainRun", *Run._fields)


class SortedTerms(NamedTuple):
    """Holds the terms of the rows' gradients, sorted by row.

    Attributes:
        words: [n] int64; `row << term_bits | term`, one per value. A term is the number of a bag, or of a value if its
            feature has weights.
        term_bits: number of bits of a term.
        features: the gradient's `native_features`.
        num_features: number of features.
    """

    words: Tensor
    term_bits: int
    features: array[int]
    num_features: int


def sort_terms(gradient: RowGradient) -> SortedTerms | None:
    """Sorts the terms by row; returns None if a row and a term do not fit into 64 bits.

    Raises:
        IndexError: a row is out of range.
        ValueError: the lengths of a feature, or the lengths of the runs, do not add up to the number of values.
    """
    bags, rows = gradient.bags, gradient.rows_of_values.contiguous()
    # The kernels see an empty tensor of weights as no weights.
    num_terms = sum(
        [
            feature.num_values if feature.weights is not None and feature.num_values else feature.num_bags
            for feature in bags
        ]
    )
    term_bits = max(num_terms - 1, 0).bit_length()
    if gradient.num_rows.bit_length() + term_bits > _MAX_WORD_BITS:
        return None
    features, _ = gradient.native_features
    runs = array(_RUN, [*itertools.chain.from_iterable(gradient.runs)] or (rows.numel(), 0, gradient.num_rows))
    words = empty_buffer(rows.numel(), dtype=torch.int64)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_sort_terms(
        rows.data_ptr(),
        rows.numel(),
        features.buffer_info()[0],
        len(bags),
        runs.buffer_info()[0],
        len(runs) // len(Run._fields),
        gradient.num_rows,
        term_bits,
        torch.get_num_threads(),
        words.data_ptr(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        check_lengths(bags)
        if sum(run.num_values for run in gradient.runs or ()) not in (0, rows.numel()):
            raise ValueError(f"expected runs of {rows.numel()} values, got {list(gradient.runs)}")
        raise library.outside_error("rows", rows, gradient.num_rows)
    return SortedTerms(words, term_bits, features, len(bags))
