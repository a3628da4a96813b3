"""Loading of the native library, which the installation builds where it finds a C++ compiler."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

HOW_TO_BUILD = "install a C++ compiler (g++), then run pip install again"

_PATH = Path(__file__).with_name("libembedtrain_native.so")

_POINTER = ctypes.c_void_p
_INT64 = ctypes.c_int64
_FLOAT = ctypes.c_float
_INT = ctypes.c_int

_SIGNATURES: dict[str, list[type]] = {
    # vectors, num_vectors, dim, inputs, targets, starts, stops, num_positions, num_targets, factor,
    # loss, grad, num_outside
    "embedtrain_skipgram_block": [
        _POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _FLOAT,
        _POINTER, _POINTER, _POINTER,
    ],
    # weight, accumulator, rows, row_grad, num_touched, num_rows, dim, lr, eps, weight_decay, decoupled,
    # rounding_keys, num_threads, num_outside
    "embedtrain_rowwise_adagrad": [
        _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _FLOAT, _FLOAT, _FLOAT, _INT,
        _POINTER, _INT, _POINTER,
    ],
    # weight, first, second, rows, row_grad, rounding_keys, second_kind, num_touched, num_rows, dim, coefficients,
    # num_threads, num_outside
    "embedtrain_moment_update": [
        _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT, _INT64, _INT64, _INT64, _POINTER,
        _INT, _POINTER,
    ],
    # weight, accumulator, dim, words, num_values, term_bits, features, num_features, factor,
    # lr, eps, weight_decay, decoupled, num_threads
    "embedtrain_rowwise_adagrad_of_terms": [
        _POINTER, _POINTER, _INT64, _POINTER, _INT64, _INT, _POINTER, _INT64, _FLOAT,
        _FLOAT, _FLOAT, _FLOAT, _INT, _INT,
    ],
    # rows, num_values, features, num_features, runs, num_runs, num_rows, term_bits, num_threads, words, num_outside
    "embedtrain_sort_terms": [
        _POINTER, _INT64, _POINTER, _INT64, _POINTER, _INT64, _INT64, _INT, _INT, _POINTER, _POINTER,
    ],
    # features, num_features, dim, largest
    "embedtrain_largest_magnitude": [_POINTER, _INT64, _INT64, _POINTER],
    # keys, num_keys, largest, num_threads, unique, starts, order, inverse, num_distinct
    "embedtrain_sort_unique": [
        _POINTER, _INT64, _INT64, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER,
    ],
    # source, source_is_bfloat16, rows, num_rows, dim, target, target_is_bfloat16, num_threads
    "embedtrain_gather_rows": [_POINTER, _INT, _POINTER, _INT64, _INT64, _POINTER, _INT, _INT],
    # source, is_bfloat16, dim, index, num_values, features, num_features, num_threads
    "embedtrain_pool_rows": [_POINTER, _INT, _INT64, _POINTER, _INT64, _POINTER, _INT64, _INT],
    # dim, order, starts, num_distinct, num_values, features, num_features, factor, grad,
    # num_threads
    "embedtrain_pool_rows_backward": [
        _INT64, _POINTER, _POINTER, _INT64, _INT64, _POINTER, _INT64, _FLOAT, _POINTER, _INT,
    ],
    # features, num_features, num_local_rows, is_whole, keys
    "embedtrain_spread_keys": [_POINTER, _INT64, _INT64, _INT, _POINTER],
    # own_region, number
    "embedtrain_publish": [_POINTER, _INT64],
    # regions, num_regions, number, patience_ms, may_spin, first_missing
    "embedtrain_await": [_POINTER, _INT64, _INT64, _INT64, _INT, _POINTER],
    # memory, bytes
    "embedtrain_advise_huge_pages": [_POINTER, _INT64],
    # tokens, positions, parts, num_tokens, keep, columns, part_starts, window, num_negatives, key,
    # words, targets, starts, stops, num_kept
    "embedtrain_sample_text": [
        _POINTER, _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64,
        _POINTER, _POINTER, _POINTER, _POINTER, _POINTER,
    ],
}  # fmt: skip


@functools.cache
def find() -> ctypes.CDLL | None:
    """Returns the library with its signatures declared, or None where it was not built."""
    if not _PATH.exists():
        return None
    loaded = ctypes.CDLL(str(_PATH))
    for name, argument_types in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes = argument_types
        function.restype = None
    return loaded


def get() -> ctypes.CDLL:
    """Returns the library.

    Raises:
        RuntimeError: it was not built.
    """
    loaded = find()
    if loaded is None:
        raise RuntimeError(f"the native library was not built: {HOW_TO_BUILD}")
    return loaded
