"""A hash of 64-bit integers (splitmix64), for random bits that are a function of a key."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
GOLDEN = _STEP - (1 << 64)
"""The increment of splitmix64 as a signed integer. Output `counter` of a key is `mix64(key + counter * GOLDEN)`."""


def mix64(values: Tensor) -> Tensor:
    """Hashes int64 values elementwise, in wrapping 64-bit arithmetic.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators" (splitmix64).
    """
    mixed = values + GOLDEN
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(_FIRST)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(_SECOND)
    return mixed ^ _shift_right(mixed, 31)


def mix64_array(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes uint64 values as `mix64` does; unsigned shifts need no mask, and a buffer is reused for them."""
    mixed = values + np.uint64(_STEP)
    shifted = np.empty_like(mixed)
    for bits, factor in ((30, _FIRST), (27, _SECOND)):
        mixed ^= np.right_shift(mixed, np.uint64(bits), out=shifted)
        mixed *= np.uint64(factor)
    mixed ^= np.right_shift(mixed, np.uint64(31), out=shifted)
    return mixed


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift_right(values: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically, so clear the copies of the sign bit.
    return (values >> bits) & ((1 << (64 - bits)) - 1)
