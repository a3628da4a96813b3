"""Exchanges rows between processes of one host through memory that they share."""

from __future__ import annotations

import ctypes
import math
import os
import select
import time
from array import array
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from embedtrain.distributed.shared_regions import HUGE_PAGE_BYTES, Files
from embedtrain.distributed.stages import count_sent
from embedtrain.ops._backend.row_memory import Block

_COUNTER_START = 64
_TABLE_START = 256
_ALIGNMENT = 64
_SLOT_BYTES = 1 << 34
"""Address space for a rank's part of one exchange. Physical memory is allocated only where it is written."""
_NUM_SLOTS = 2
_PATIENCE_MS = 50

_NUMBERS_PER_ENTRY = 4
"""A rank tells each receiver start and number of its rows in the slot, and start and bytes of the rows it is lent."""
_NOTHING_LENT = -1


class LendingArea:
    """Holds one tensor at a time that other ranks read where it is.

    Args:
        memory: [n] uint8; a part of this rank's region that begins at a huge page.

    Attributes:
        memory: see above.
        lent_in: number of the exchange in which its rows were lent last; -1 before the first.
        why_not: why the area cannot be used; None if it can.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.lent_in = memory, -1
        self.why_not: str | None = None
        self._huge_bytes = 0
        self._block = Block(memory.untyped_storage(), (0,), torch.float32)

    def buffer(self, shape: tuple[int, ...], num_complete: int) -> Tensor | None:
        """Returns uninitialised float32 memory; None if it is in use, too small, or the system has no huge pages.

        The caller adds to rows at random places, which is slow in small pages.

        Args:
            shape: shape of the tensor.
            num_complete: number of exchanges that are complete. Ranks read the rows of an exchange until the next one.
        """
        num_bytes = 4 * math.prod(shape)
        is_read = self.lent_in >= num_complete
        if self.why_not is not None or is_read or num_bytes > len(self.memory) or not self._block.is_free:
            return None
        self._use_huge_pages(num_bytes)
        return None if self.why_not is not None else self._block.lease(shape, torch.float32)

    def _use_huge_pages(self, num_bytes: int) -> None:
        from embedtrain.ops._backend import library

        missing = -(-num_bytes // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES - self._huge_bytes
        if missing > 0:
            error = ctypes.c_int64()
            begin = self.memory.data_ptr() + self._huge_bytes
            library.get().embedtrain_collapse_pages(begin, missing, ctypes.addressof(error))
            if error.value:
                self.why_not = f"shared memory has no huge pages: {os.strerror(error.value)}"
            else:
                self._huge_bytes += missing


class Inbox:
    """Exchanges rows through a part of one region of memory per rank, which its rank writes and all ranks read.

    An exchange has three parts: `rooms` returns buffers, which the caller fills; then `send`; then `receive`. For rows
    in other memory, `exchange` does all three.

    An inbox has two slots in each region, used in turn. Before a rank writes a slot again, all ranks have sent the
    exchange in between, so they no longer read the slot. Received rows are valid until this rank's next `send`.

    A rank can also lend rows of its lending areas, without copying them to a slot: `lend` before `send`, and `borrowed`
    after `receive`. It must not change them before the next exchange is complete.

    Args:
        rank: number of this rank.
        regions: the memory of each rank.
        start: where the inbox begins in each region; several inboxes may share the regions.
        peers: a pidfd of every other rank.
        num_areas: number of lending areas.
        timeout_seconds: how long to wait for a rank that lives.

    Attributes:
        number: number of exchanges that this rank sent.
        num_complete: number of exchanges in which this rank has heard all others.
        areas: parts of this rank's region for rows that it lends.
    """

    def __init__(
        self,
        rank: int,
        regions: Sequence[memoryview],
        start: int,
        peers: Files,
        *,
        num_areas: int,
        timeout_seconds: float,
    ) -> None:
        self.rank, self.size = rank, len(regions)
        self._timeout_seconds = timeout_seconds
        self._files = peers
        self._peers = dict(zip([r for r in range(self.size) if r != self.rank], peers.files, strict=True))
        views = [region[start : start + inbox_bytes(self.size, num_areas)] for region in regions]
        self._bytes = [torch.frombuffer(view, dtype=torch.uint8) for view in views]
        self._tables = [view[_TABLE_START : _header_bytes(self.size)].cast("q") for view in views]
        self._counters = [view[_COUNTER_START : _COUNTER_START + 4].cast("I") for view in views]
        self._own_address = self._bytes[self.rank].data_ptr()
        self._addresses = array("Q", [self._bytes[rank].data_ptr() for rank in self._peers])
        self._may_spin = self.size <= len(os.sched_getaffinity(0))
        self.number = self.num_complete = 0
        memory = self._bytes[self.rank][_header_bytes(self.size) + _NUM_SLOTS * _SLOT_BYTES :].split(_SLOT_BYTES)
        # A storage for each area, because a storage counts the tensors that refer to it.
        self.areas = [LendingArea(torch.frombuffer(area.numpy(), dtype=torch.uint8)) for area in memory if len(area)]

    def rooms(self, counts: Sequence[int], row_shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Returns the send buffers, which the caller must fill before `send`.

        Args:
            counts: number of rows for each rank. The entry of this rank is ignored.
            row_shape: shape of a row.
            dtype: dtype of the rows.

        Returns:
            One uninitialised buffer per rank, [count, *row_shape]; [0, *row_shape] for this rank.
        """
        slot = (self.number + 1) % _NUM_SLOTS
        start = at = _header_bytes(self.size) + slot * _SLOT_BYTES
        row_bytes = dtype.itemsize * math.prod(row_shape)
        rooms = []
        table = self._tables[self.rank]
        for receiver, count in enumerate(self._without_own(counts)):
            place = self._place(self.number + 1, receiver)
            table[place], table[place + 1], table[place + 2] = at, count, _NOTHING_LENT
            rooms.append(self._rows(self.rank, at, count, row_shape, dtype))
            at += -(-count * row_bytes // _ALIGNMENT) * _ALIGNMENT
            count_sent(count * row_bytes)
        if at - start > _SLOT_BYTES:
            raise RuntimeError(f"one exchange takes {at - start} bytes, and at most {_SLOT_BYTES} are possible")
        return rooms

    def lend(self, area: LendingArea, parts: Sequence[Tensor]) -> None:
        """Tells each rank where its part of the rows in a lending area is; after `rooms` and before `send`."""
        area.lent_in = self.number + 1
        table = self._tables[self.rank]
        for receiver, part in enumerate(parts):
            if receiver != self.rank:
                place = self._place(self.number + 1, receiver)
                table[place + 2], table[place + 3] = part.data_ptr() - self._own_address, part.nbytes
                count_sent(part.nbytes)

    def borrowed(self, sender: int, count: int, row_shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Returns the rows that a rank lent in the exchange just received, [count, *row_shape]; None if it lent none.

        Raises:
            ValueError: it lent rows of other sizes, or another number of rows.
        """
        place = self._place(self.number, self.rank)
        start, num_bytes = self._tables[sender][place + 2], self._tables[sender][place + 3]
        if start == _NOTHING_LENT:
            return None
        expected = count * math.prod(row_shape) * dtype.itemsize
        if num_bytes != expected:
            raise ValueError(f"a rank sent {num_bytes} bytes of rows to a rank that expects {expected}")
        return self._rows(sender, start, count, row_shape, dtype)

    def send(self) -> None:
        """Publishes the filled send buffers to the other ranks."""
        from embedtrain.ops._backend import library

        self.number += 1
        library.get().embedtrain_publish(self._own_address, self.number)

    def receive(self, row_shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Waits for the other ranks and returns the rows that they sent, without copying them.

        Args:
            row_shape: shape of a row.
            dtype: dtype of the rows.

        Returns:
            One tensor per rank, [count, *row_shape]; [0, *row_shape] for this rank.

        Raises:
            dist.DistError: a rank died, or did not send before the group's timeout.
        """
        self._await_peers()
        self.num_complete = self.number
        place = self._place(self.number, self.rank)
        parts = []
        for sender, table in enumerate(self._tables):
            start, count = table[place], table[place + 1]
            parts.append(self._rows(sender, start, count, row_shape, dtype))
        return parts

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Sends one part to each rank; returns the parts that the ranks sent, without copying them.

        Args:
            parts: one tensor per rank, [count, *row_shape]; row shape and dtype must be the same on all ranks. The part
                of this rank is returned as it is.
        """
        row_shape, dtype = parts[0].shape[1:], parts[0].dtype
        for rank, room in enumerate(self.rooms([len(part) for part in parts], row_shape, dtype)):
            if rank != self.rank:
                copy_rows(parts[rank], room)
        self.send()
        arrived = self.receive(row_shape, dtype)
        arrived[self.rank] = parts[self.rank]
        return arrived

    def was_received(self, tensor: Tensor) -> bool:
        """Returns whether a tensor lies in the region of another rank, which may overwrite it."""
        return any(lies_in(tensor, self._bytes[rank]) for rank in self._peers)

    def _place(self, number: int, receiver: int) -> int:
        """Returns where the numbers for a receiver begin in a rank's table, given the number of the exchange."""
        return _NUMBERS_PER_ENTRY * (number % _NUM_SLOTS * self.size + receiver)

    def _without_own(self, counts: Sequence[int]) -> list[int]:
        return [0 if rank == self.rank else count for rank, count in enumerate(counts)]

    def _rows(self, rank: int, start: int, count: int, row_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        num_bytes = count * math.prod(row_shape) * dtype.itemsize
        return self._bytes[rank][start : start + num_bytes].view(dtype).view(count, *row_shape)

    def _await_peers(self) -> None:
        from embedtrain.ops._backend import library

        first_missing = ctypes.c_int64()
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            library.get().embedtrain_await(
                self._addresses.buffer_info()[0],
                len(self._peers),
                self.number,
                _PATIENCE_MS,
                int(self._may_spin),
                ctypes.addressof(first_missing),
            )
            if first_missing.value == len(self._peers):
                return
            missing = list(self._peers)[first_missing.value]
            self._check_peers()
            if time.monotonic() > deadline:
                raise dist.DistError(
                    f"rank {self.rank} waited {self._timeout_seconds:.0f} s for rank {missing}'s part of an exchange"
                )

    def _check_peers(self) -> None:
        poll = select.poll()
        for file in self._peers.values():
            poll.register(file, select.POLLIN)
        dead = {file for file, _ in poll.poll(0)}
        for rank, file in self._peers.items():
            # A rank that has sent its part may have ended normally.
            if file in dead and self._counters[rank][0] != self.number % (1 << 32):
                raise dist.DistError(f"rank {rank} is gone: rank {self.rank} waited for its part of an exchange")


def copy_rows(source: Tensor, target: Tensor) -> Tensor:
    """Copies a tensor to or from shared memory; returns the target.

    Raises:
        ValueError: the shapes differ, because the ranks disagree on the number of rows.
    """
    if source.shape != target.shape:
        raise ValueError(f"a rank sent rows {list(source.shape)} to a rank that expects {list(target.shape)}")
    if source.dtype != target.dtype or not (source.is_contiguous() and target.is_contiguous()):
        return target.copy_(source)
    from embedtrain.ops._backend import library

    library.get().embedtrain_copy(source.data_ptr(), target.data_ptr(), source.nbytes)
    return target


def _header_bytes(world_size: int) -> int:
    table_bytes = 8 * _NUMBERS_PER_ENTRY * _NUM_SLOTS * world_size
    return -(-(_TABLE_START + table_bytes) // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES


def inbox_bytes(world_size: int, num_areas: int) -> int:
    """Returns the size of an inbox in the region of each rank."""
    return _header_bytes(world_size) + (_NUM_SLOTS + num_areas) * _SLOT_BYTES


def lies_in(tensor: Tensor, memory: Tensor) -> bool:
    """Returns whether a tensor begins in the memory of a tensor of bytes."""
    return memory.data_ptr() <= tensor.data_ptr() < memory.data_ptr() + len(memory)
