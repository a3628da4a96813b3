"""Memory for rows: tables that are read at random, and the large buffers that every step needs again."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch, library

_SMALLEST_BLOCK_BYTES = 1 << 18
"""Smaller buffers come from the allocator, which has them at hand."""
_LARGEST_KEPT_BYTES = 1 << 30
"""Blocks beyond this sum go back to the system once they are free, the longest unused first."""


def allocate_rows(shape: tuple[int, ...], fill: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor full of `fill`; on CPU in large pages if the system has them.

    With small pages each random row costs a walk of the page table beside the row itself.
    """
    rows = torch.empty(shape, dtype=dtype, device=device)
    _advise_huge_pages(rows)
    return rows.fill_(fill)


def empty_buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns an uninitialised CPU tensor whose memory serves again once no tensor refers to it.

    The allocator gives large blocks back to the system and takes fresh ones the next step, which are mapped page by
    page while they are written: that takes longer than the kernels that write them.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _SMALLEST_BLOCK_BYTES:
        return torch.empty(shape, dtype=dtype)
    return _blocks.lease(num_bytes, shape, dtype)


class _Block:
    """Memory that is in use while any tensor that was leased refers to it."""

    def __init__(self, num_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.num_bytes = num_bytes
        self._storage = _allocate(num_bytes).untyped_storage()
        self._latest = self._make(shape, dtype)
        self._own_references = self._count()

    @property
    def is_free(self) -> bool:
        return self._count() == self._own_references

    def lease(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # Most steps want the shape of the step before. Making a tensor of a storage takes several times as long as
        # copying one, above all if other work has just emptied the caches.
        if self._latest.shape != shape or self._latest.dtype != dtype:
            self._latest = self._make(shape, dtype)
        # `data` is no view to autograd: the caller may change it in place like any other tensor.
        return self._latest.data

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype).set_(self._storage, 0, shape)  # type: ignore[call-overload,no-any-return]

    def _count(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage._cdata))


class _Blocks:
    """Blocks that were handed out; sizes are powers of two or three quarters of one, so that similar batches share.

    The references are counted, and nothing runs when the last one goes: that may be in a thread of the process group
    while Python shuts down.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []  # the latest used last

    def lease(self, num_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns a tensor of `num_bytes` bytes in memory that no other tensor refers to."""
        power = 1 << (num_bytes - 1).bit_length()
        size = power // 4 * 3 if num_bytes <= power // 4 * 3 else power
        with self._lock:
            for position in range(len(self._blocks) - 1, -1, -1):
                if self._blocks[position].num_bytes == size and self._blocks[position].is_free:
                    block = self._blocks.pop(position)
                    break
            else:
                self._drop_free_blocks(size)
                block = _Block(size, shape, dtype)
            self._blocks.append(block)
            return block.lease(shape, dtype)  # under the lock: from here on the block is in use

    def _drop_free_blocks(self, wanted_bytes: int) -> None:
        """Makes room for another block, the longest unused first; blocks in use leave the record too."""
        room = _LARGEST_KEPT_BYTES - wanted_bytes
        while self._blocks and sum(block.num_bytes for block in self._blocks) > room:
            del self._blocks[0]


def _allocate(num_bytes: int) -> Tensor:
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    _advise_huge_pages(memory)
    return memory


def _advise_huge_pages(memory: Tensor) -> None:
    if dispatch.uses_native(memory):
        # Before the first write: that is when pages are chosen.
        library.get().embedtrain_advise_huge_pages(memory.data_ptr(), memory.numel() * memory.element_size())


_blocks = _Blocks()
