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

_SIGNATURES: dict[str, list[type]] = {
    # vectors, num_vectors, dim, inputs, outputs, negatives, starts, stops, num_positions, num_negatives,
    # loss, grad
    "embedtrain_skipgram_block": [
        _POINTER, _INT64, _INT64, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64,
        _POINTER, _POINTER,
    ],
    # weight, accumulator, rows, row_grad, num_touched, dim, lr, eps, weight_decay, decoupled
    "embedtrain_rowwise_adagrad_float32": [
        _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _FLOAT, _FLOAT, _FLOAT, ctypes.c_int,
    ],
    # the same, and rounding_keys
    "embedtrain_rowwise_adagrad_bfloat16": [
        _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _FLOAT, _FLOAT, _FLOAT, ctypes.c_int,
        _POINTER,
    ],
    # tokens, positions, num_tokens, keep, own, other, num_rows, window, num_negatives, key,
    # words, negatives, starts, stops, num_kept
    "embedtrain_sample_text": [
        _POINTER, _POINTER, _INT64, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT64,
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
