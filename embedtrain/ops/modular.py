"""Products modulo a table's size, in 64-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor

DIRECT_PRODUCT_ROWS = 1 << 31
"""Up to this modulus a product fits into 64 bits as it stands."""

_LOW_BITS = 20


def multiply_modulo(values: Tensor, factor: int, modulus: int) -> Tensor:
    """Returns `(values * factor) mod modulus` without overflow for values and factor below 2**40."""
    if modulus <= DIRECT_PRODUCT_ROWS:
        return torch.remainder(values * factor, modulus)
    high = torch.remainder((values >> _LOW_BITS) * factor, modulus)
    low = (values & ((1 << _LOW_BITS) - 1)) * factor
    return torch.remainder((high << _LOW_BITS) + torch.remainder(low, modulus), modulus)
