"""Rounding to bfloat16 inside Triton kernels, bit for bit as in the other implementations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix64(values):
    """Hashes uint64 values; see `embedtrain.ops._backend.mix`."""
    mixed = values + 0x9E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB
    return mixed ^ (mixed >> 31)


@triton.jit
def round_to_bfloat16(values, keys, columns):
    """Rounds float32 [rows, columns] stochastically, by keys [rows] int64 and the column numbers."""
    of_rows = mix64(keys.to(tl.uint64, bitcast=True))
    noise = mix64(of_rows[:, None] + columns[None, :].to(tl.uint64)) & 0xFFFF
    # The noise is added below the kept bits and carries into them with the right probability.
    bits = values.to(tl.uint32, bitcast=True) + noise.to(tl.uint32)
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def nearest_bfloat16(values):
    """Rounds float32 values to the nearest bfloat16, ties to even; Triton's interpreter would truncate instead."""
    bits = values.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(values == values, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
