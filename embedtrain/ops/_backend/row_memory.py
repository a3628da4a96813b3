"""Allocates memory for tables, and reuses the large buffers that every step needs."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch, library

_SMALLEST_BLOCK_BYTES = 1 << 18
"""Smaller buffers come from torch's allocator, which is fast for them."""
_LARGEST_KEPT_BYTES = 1 << 30
"""Limit of the total size of kept blocks; beyond it, the least recently used blocks are released."""


def allocate_rows(shape: tuple[int, ...], fill: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a tensor filled with `fill`; on a CPU in huge pages if the system supports them.

    With small pages, each access to a random row also costs a walk of the page table.
    """
    rows = torch.empty(shape, dtype=dtype, device=device)
    _advise_huge_pages(rows)
    return rows.fill_(fill)


def empty_buffer(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns an uninitialised CPU tensor whose memory is reused once no tensor refers to it.

    The default allocator returns large blocks to the system and gets new ones in the next step. The kernel maps new
    blocks page by page at the first write, which takes longer than the computation that writes them.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _SMALLEST_BLOCK_BYTES:
        return torch.empty(shape, dtype=dtype)
    return _blocks.lease(num_bytes, shape, dtype)


def buffer_for(given: Tensor | None, num_rows: int, dim: int) -> Tensor:
    """Returns the buffer that a caller gave for a kernel's result, or an `empty_buffer` if it gave none.

    Raises:
        ValueError: the given buffer has another shape or dtype, or is not contiguous.
    """
    if given is None:
        return empty_buffer(num_rows, dim)
    if given.shape != (num_rows, dim) or given.dtype != torch.float32 or not given.is_contiguous():
        raise ValueError(
            f"expected a contiguous buffer [{num_rows}, {dim}] float32, got {given.dtype} {tuple(given.shape)}"
        )
    return given


class Block:
    """Holds a block of memory, which is in use while a leased tensor refers to it.

    Args:
        storage: the memory; no other tensor may refer to it.
        shape, dtype: of the first tensor to lease; most steps need the same.
    """

    def __init__(self, storage: torch.UntypedStorage, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.num_bytes = storage.nbytes()
        self._storage = storage
        self._latest = self._make(shape, dtype)
        self._own_references = self._count()

    @property
    def is_free(self) -> bool:
        """Whether no leased tensor refers to the memory."""
        return self._count() == self._own_references

    def lease(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns a tensor in this memory."""
        # Most steps need the same shape as the previous step. Constructing a tensor over a storage takes several times
        # as long as copying one, especially with cold caches.
        if self._latest.shape != shape or self._latest.dtype != dtype:
            self._latest = self._make(shape, dtype)
        # Autograd does not treat `data` as a view, so the caller may change the tensor in place.
        return self._latest.data

    def _make(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(0, dtype=dtype).set_(self._storage, 0, shape)  # type: ignore[call-overload,no-any-return]

    def _count(self) -> int:
        return int(torch._C._storage_Use_Count(self._storage._cdata))


class _Blocks:
    """Holds all kept blocks. Sizes are 2**k or 3/4 * 2**k, so that batches of similar size share blocks.

    A block is free when its reference count says so. No code runs when the last reference is dropped, because that can
    happen in a thread of the process group while Python shuts down.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[Block] = []  # most recently used last

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
                block = Block(_allocate(size).untyped_storage(), shape, dtype)
            self._blocks.append(block)
            return block.lease(shape, dtype)  # inside the lock, because this marks the block as in use

    def _drop_free_blocks(self, wanted_bytes: int) -> None:
        """Drops the least recently used blocks to make room; a block in use is freed when its tensors are."""
        room = _LARGEST_KEPT_BYTES - wanted_bytes
        while self._blocks and sum(block.num_bytes for block in self._blocks) > room:
            del self._blocks[0]


def _allocate(num_bytes: int) -> Tensor:
    memory = torch.empty(num_bytes, dtype=torch.uint8)
    _advise_huge_pages(memory)
    return memory


def _advise_huge_pages(memory: Tensor) -> None:
    if dispatch.uses_native(memory):
        # The kernel chooses the page size at the first write, so advise before it.
        library.get().embedtrain_advise_huge_pages(memory.data_ptr(), memory.numel() * memory.element_size())


_blocks = _Blocks()
