"""Memory for rows: tables that are read at random, and the large buffers that every step needs again."""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref

import torch
from torch import Tensor

from embedtrain.ops import dispatch

_SMALLEST_BLOCK_BYTES = 1 << 18
"""Smaller buffers come from the allocator, which has them at hand."""
_LARGEST_KEPT_BYTES = 1 << 30
"""Free blocks beyond this sum go back to the system, the ones that were freed first."""


def allocate_rows(shape: tuple[int, ...], fill: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor full of `fill`; on CPU in large pages where the system has them.

    With small pages each random row costs a walk of the page table beside the row itself.
    """
    rows = torch.empty(shape, dtype=dtype, device=device)
    if rows.numel() and dispatch.uses_native(rows):
        from embedtrain.ops.native import library

        # Before the first write: that is when pages are chosen.
        library.get().embedtrain_advise_huge_pages(rows.data_ptr(), rows.numel() * rows.element_size())
    return rows.fill_(fill)


def empty_buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns an uninitialised CPU tensor whose memory serves again once no tensor refers to it.

    The allocator gives large blocks back to the system and takes fresh ones the next step, which are mapped page by
    page while they are written: that takes longer than the kernels that write them.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _SMALLEST_BLOCK_BYTES:
        return torch.empty(shape, dtype=dtype)
    lease = _blocks.lease(num_bytes)
    return torch.frombuffer(lease, dtype=dtype, count=math.prod(shape)).view(shape)


class _Blocks:
    """Free blocks by size; sizes are powers of two and their halves between, so that similar batches share them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a lease may end, by garbage collection, in the middle of another
        self._free: list[mmap.mmap] = []

    def lease(self, num_bytes: int) -> ctypes.Array[ctypes.c_char]:
        """Returns memory; the block is free again when the object is gone, which a tensor on it keeps."""
        power = 1 << (num_bytes - 1).bit_length()
        size = power // 4 * 3 if num_bytes <= power // 4 * 3 else power
        block = self._take(size)
        if block is None:
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                block.madvise(mmap.MADV_HUGEPAGE)
        lease = (ctypes.c_char * size).from_buffer(block)
        weakref.finalize(lease, self._give_back, block).atexit = False
        return lease

    def _take(self, size: int) -> mmap.mmap | None:
        with self._lock:
            # The newest first: it is the likeliest to be in the cache.
            for position in range(len(self._free) - 1, -1, -1):
                if len(self._free[position]) == size:
                    return self._free.pop(position)
        return None

    def _give_back(self, block: mmap.mmap) -> None:
        with self._lock:
            self._free.append(block)
            while sum(map(len, self._free)) > _LARGEST_KEPT_BYTES:
                del self._free[0]


_blocks = _Blocks()
