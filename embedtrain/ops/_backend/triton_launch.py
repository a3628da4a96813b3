"""Helpers for launching Triton kernels: tile sizes, numbers of warps and the current device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_TILE_ELEMENTS = 2048
"""Row elements that a program of four warps holds in registers: 16 per thread."""
_MOST_ROWS = 32


def power_of_2(value: int) -> int:
    """Returns the smallest power of two that is at least `value`; Triton requires such tile sizes."""
    return 1 << max(value - 1, 0).bit_length()


def tile(dim: int) -> tuple[int, int]:
    """Returns the number of rows and of columns of a program's tile, which holds whole rows."""
    columns = power_of_2(dim)
    return max(1, min(_MOST_ROWS, _TILE_ELEMENTS // columns)), columns


def num_warps(tile_elements: int) -> int:
    """Returns the number of warps for a program whose largest tile has `tile_elements` elements."""
    return max(1, min(8, power_of_2(tile_elements // 512)))


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, because Triton launches kernels on the current GPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
