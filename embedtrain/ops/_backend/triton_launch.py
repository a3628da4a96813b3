"""What every kernel's launch shares: tile sizes and the device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_TILE_ELEMENTS = 2048
"""Of rows held in registers by a program of four warps: 16 elements a thread."""
_MOST_ROWS = 32


def power_of_2(value: int) -> int:
    """Returns the least power of two that is at least `value`: Triton's tiles have no other sides."""
    return 1 << max(value - 1, 0).bit_length()


def tile(dim: int) -> tuple[int, int]:
    """Returns how many rows, and how many columns, a program works on, so that whole rows lie in its tile."""
    columns = power_of_2(dim)
    return max(1, min(_MOST_ROWS, _TILE_ELEMENTS // columns)), columns


def num_warps(tile_elements: int) -> int:
    """Returns the warps of a program whose largest tile has so many elements."""
    return max(1, min(8, power_of_2(tile_elements // 512)))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one: kernels are launched there, whatever their arguments."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
