"""Products modulo the size of a table, in 64-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor

DIRECT_PRODUCT_ROWS = 1 << 31
"""Up to this modulus, a product of two residues fits into 64 bits."""

_LOW_BITS = 20


def multiply_modulo(values: Tensor, factor: int, modulus: int) -> Tensor:
    """Returns `(values * factor) mod modulus` without overflow for values and factor below 2**40."""
    if modulus <= DIRECT_PRODUCT_ROWS:
        return torch.remainder(values * factor, modulus)
    high = torch.remainder((values >> _LOW_BITS) * factor, modulus)
    low = (values & ((1 << _LOW_BITS) - 1)) * factor
    return torch.remainder((high << _LOW_BITS) + torch.remainder(low, modulus), modulus)


def permute_blocks(values: Tensor, factor: int, num_values: int, block: int) -> Tensor:
    """Permutes `[0, num_values)` by blocks: block `b` moves to `(b * factor) mod (num_values // block)`.

    A value keeps its position inside its block. Values after the last whole block do not move.

    Args:
        values: int64, each in `[0, num_values)`; any shape.
        factor: coprime to the number of blocks; the modular inverse of `factor` inverts the permutation.
        num_values: size of the range, below 2**40.
        block: number of values per block, at most `num_values`.
    """
    if block == 1:
        return multiply_modulo(values, factor, num_values)
    num_blocks = num_values // block
    number = torch.div(values, block, rounding_mode="floor")
    moved = multiply_modulo(number, factor, num_blocks) - number
    return values + block * moved.masked_fill(number == num_blocks, 0)
