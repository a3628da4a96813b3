"""A hash of 64-bit integers: random bits that are a function of what they are for."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""The step of splitmix64's stream, as a signed integer: `mix64(key + counter * GOLDEN)` is its output."""


def mix64(values: Tensor) -> Tensor:
    """Hashes int64 values elementwise, in wrapping 64-bit arithmetic.

    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators" (splitmix64).
    """
    mixed = values + GOLDEN
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(0x94D049BB133111EB)
    return mixed ^ _shift_right(mixed, 31)


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _shift_right(values: Tensor, bits: int) -> Tensor:
    # torch shifts int64 arithmetically: clear the copies of the sign bit.
    return (values >> bits) & ((1 << (64 - bits)) - 1)
