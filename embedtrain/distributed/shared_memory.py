"""Exchanges rows between the ranks of one host through shared memory, which receivers read in place."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import mmap
import os
import secrets
import select
import time
import weakref
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from embedtrain.distributed.ranks import GroupRanks, OneProcess, Ranks, by_kind
from embedtrain.distributed.stages import count_sent, stage
from embedtrain.ops._backend import dispatch
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.sort_unique import OrderedKeys, SortedKeys

VARIABLE = "EMBEDTRAIN_SHARED_MEMORY"
"""Environment variable: 0 makes the ranks of one host exchange rows through the process group."""

_NAME = "embedtrain"
_TOKEN_BYTES = 16
_COUNTER_START = 64
_TABLE_START = 256
_ALIGNMENT = 64
_SLOT_BYTES = 1 << 34
"""Address space for a rank's part of one exchange. Physical memory is allocated only where it is written."""
_NUM_INBOXES = 2
_PATIENCE_MS = 50

_logger = logging.getLogger(__name__)


class _Address(NamedTuple):
    """Tells another process of the host where to find a region."""

    pid: int
    file: int
    token: bytes


class _Files:
    """Holds file descriptors, and closes them when nothing refers to it any more."""

    def __init__(self, files: Sequence[int]) -> None:
        self.files = files

    def __del__(self) -> None:
        for file in self.files:
            with contextlib.suppress(OSError):
                os.close(file)


class Inbox:
    """Exchanges rows through a part of one region of memory per rank, which its rank writes and all ranks read.

    An exchange has three parts: `rooms` returns buffers, which the caller fills; then `send`; then `receive`. For rows
    in other memory, `exchange` does all three.

    An inbox has two slots in each region, used in turn. Before a rank writes a slot again, all ranks have sent the
    exchange in between, so they no longer read the slot. Received rows are valid until this rank's next `send`.

    Args:
        rank: number of this rank.
        regions: the memory of each rank.
        start: where the inbox begins in each region; several inboxes may share the regions.
        peers: a pidfd of every other rank.
        timeout_seconds: how long to wait for a rank that lives.
    """

    def __init__(
        self, rank: int, regions: Sequence[mmap.mmap], start: int, peers: _Files, *, timeout_seconds: float
    ) -> None:
        self.rank, self.size = rank, len(regions)
        self._timeout_seconds = timeout_seconds
        self._files = peers
        self._peers = dict(zip([r for r in range(self.size) if r != self.rank], peers.files, strict=True))
        views = [memoryview(region)[start : start + _inbox_bytes(self.size)] for region in regions]
        self._bytes = [torch.frombuffer(view, dtype=torch.uint8) for view in views]
        self._tables = [view[_TABLE_START : _header_bytes(self.size)].cast("q") for view in views]
        self._counters = [view[_COUNTER_START : _COUNTER_START + 4].cast("I") for view in views]
        self._own_address = self._bytes[self.rank].data_ptr()
        self._addresses = array("Q", [self._bytes[rank].data_ptr() for rank in self._peers])
        self._may_spin = self.size <= len(os.sched_getaffinity(0))
        self._number = 0

    def rooms(self, counts: Sequence[int], row_shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """Returns the send buffers, which the caller must fill before `send`.

        Args:
            counts: number of rows for each rank. The entry of this rank is ignored.
            row_shape: shape of a row.
            dtype: dtype of the rows.

        Returns:
            One uninitialised buffer per rank, [count, *row_shape]; [0, *row_shape] for this rank.
        """
        slot = (self._number + 1) % 2
        start = at = _header_bytes(self.size) + slot * _SLOT_BYTES
        row_bytes = dtype.itemsize * math.prod(row_shape)
        rooms = []
        table = self._tables[self.rank]
        for receiver, count in enumerate(self._without_own(counts)):
            place = 2 * (slot * self.size + receiver)
            table[place], table[place + 1] = at, count
            rooms.append(self._rows(self.rank, at, count, row_shape, dtype))
            at += -(-count * row_bytes // _ALIGNMENT) * _ALIGNMENT
            count_sent(count * row_bytes)
        if at - start > _SLOT_BYTES:
            raise RuntimeError(f"one exchange takes {at - start} bytes, and at most {_SLOT_BYTES} are possible")
        return rooms

    def send(self) -> None:
        """Publishes the filled send buffers to the other ranks."""
        from embedtrain.ops._backend import library

        self._number += 1
        library.get().embedtrain_publish(self._own_address, self._number)

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
        place = 2 * (self._number % 2 * self.size + self.rank)
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
                _copy(parts[rank], room)
        self.send()
        arrived = self.receive(row_shape, dtype)
        arrived[self.rank] = parts[self.rank]
        return arrived

    def holds(self, tensor: Tensor) -> bool:
        """Returns whether a tensor lies in this inbox."""
        address = tensor.data_ptr()
        return any(first.data_ptr() <= address < first.data_ptr() + first.numel() for first in self._bytes)

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
                self._number,
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
            if file in dead and self._counters[rank][0] != self._number % (1 << 32):
                raise dist.DistError(f"rank {rank} is gone: rank {self.rank} waited for its part of an exchange")


class SharedMemoryRanks(GroupRanks):
    """Implements `Ranks` for the ranks of one host; GPU tensors and objects still go through the process group.

    Args:
        group: the process group.
        inbox: the shared memory.
        lent: shared memory for rows that are read in place, also during other exchanges.
    """

    def __init__(self, group: dist.ProcessGroup, inbox: Inbox, lent: Inbox) -> None:
        super().__init__(group)
        self._inbox, self._lent = inbox, lent
        self._keep: weakref.WeakMethod[Callable[[Ranks], object]] | None = None

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """See `Ranks`."""
        if rows.is_cuda:
            return super().all_to_all(rows, send_counts, receive_counts)
        with stage("exchange"):
            received = empty_buffer(sum(receive_counts), *rows.shape[1:], dtype=rows.dtype)
            arrived = self._inbox.exchange(rows.split(list(send_counts)))
            for target, part in zip(received.split(list(receive_counts)), arrived, strict=True):
                _copy(part, target)
        return received

    def all_to_all_split(
        self,
        rows: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        dtype: torch.dtype,
        numbers: Tensor | None = None,
        keep: Callable[[Ranks], object] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Returns the rows of other ranks where their senders wrote them, without copying them; see `Ranks`."""
        if rows.is_cuda:
            return super().all_to_all_split(rows, send_counts, receive_counts, dtype, numbers, keep)
        keep_earlier = None if self._keep is None else self._keep()
        if keep_earlier is not None:
            keep_earlier(self)
        self._keep = None if keep is None else weakref.WeakMethod(keep)
        number_bytes = 0 if numbers is None else numbers.element_size()
        row_bytes = math.prod(rows.shape[1:]) * rows.element_size() + number_bytes

        def opened(letter: Tensor, count: int) -> tuple[Tensor, Tensor]:
            """Returns the numbers and the rows of a letter; the numbers are first, because of their alignment."""
            of_numbers, of_rows = letter.split([count * number_bytes, len(letter) - count * number_bytes])
            return of_numbers.view(torch.float32), of_rows.view(rows.dtype).view(count, *rows.shape[1:])

        with stage("exchange"):
            own_rows = rows.split(list(send_counts))
            nothing = [rows.new_empty(0, dtype=torch.float32)] * self.size
            own_numbers = nothing if numbers is None else numbers.split(list(send_counts))
            rooms = self._lent.rooms([count * row_bytes for count in send_counts], (), torch.uint8)
            for rank, count in enumerate(send_counts):
                if rank != self.rank:
                    room_of_numbers, room_of_rows = opened(rooms[rank], count)
                    room_of_numbers.copy_(own_numbers[rank])
                    _copy(own_rows[rank], room_of_rows)
            self._lent.send()
            letters = self._lent.receive((), torch.uint8)
            arrived = [
                (own_numbers[rank], own_rows[rank]) if rank == self.rank else opened(letters[rank], count)
                for rank, count in enumerate(receive_counts)
            ]
            parts = [of_rows.to(dtype) for _, of_rows in arrived]
            return parts, None if numbers is None else torch.cat([of_numbers for of_numbers, _ in arrived])

    def kept(self, rows: Sequence[Tensor | None]) -> list[Tensor | None]:
        """See `Ranks`."""
        return [part.clone() if part is not None and self._lent.holds(part) else part for part in rows]

    def all_to_all_written(
        self,
        write: Callable[[Sequence[Tensor]], object],
        like: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        *,
        is_kept: bool,
    ) -> list[Tensor]:
        """Lets `write` fill shared memory directly; see `Ranks`."""
        if like.is_cuda:
            return super().all_to_all_written(write, like, send_counts, receive_counts, is_kept=is_kept)
        row_shape, dtype = like.shape[1:], like.dtype
        own = empty_buffer(send_counts[self.rank], *row_shape, dtype=dtype)
        rooms = self._inbox.rooms(send_counts, row_shape, dtype)
        rooms[self.rank] = own
        write(rooms)
        with stage("exchange"):
            self._inbox.send()
            arrived = self._inbox.receive(row_shape, dtype)
            if is_kept:
                arrived = [_copy(part, empty_buffer(*part.shape, dtype=dtype)) for part in arrived]
        arrived[self.rank] = own
        return arrived

    def all_to_all_gather(
        self,
        source: Tensor,
        rows: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        wire_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        """Gathers rows directly into shared memory, and this rank's own rows into the result; see `Ranks`."""
        if source.is_cuda:
            return super().all_to_all_gather(source, rows, send_counts, receive_counts, wire_dtype, dtype)
        row_shape, sent = source.shape[1:], rows.split(list(send_counts))
        with stage("exchange"):
            for rank, room in enumerate(self._inbox.rooms(send_counts, row_shape, wire_dtype)):
                if rank != self.rank:
                    gather_rows(source, sent[rank], out=room)
            self._inbox.send()
            received = empty_buffer(sum(receive_counts), *row_shape, dtype=dtype)
            targets = received.split(list(receive_counts))
            if wire_dtype == source.dtype:
                gather_rows(source, sent[self.rank], out=targets[self.rank])
            else:  # own rows are rounded to the wire dtype, as rows from other ranks are
                targets[self.rank].copy_(gather_rows(source, sent[self.rank], wire_dtype))
            for rank, arrived in enumerate(self._inbox.receive(row_shape, wire_dtype)):
                if rank != self.rank:
                    _copy(arrived, targets[rank])
        return received

    def ask(
        self, counts: Tensor, keys: Sequence[OrderedKeys | SortedKeys], rows_per_rank: Sequence[int]
    ) -> tuple[list[list[list[list[int]]]], list[Tensor]]:
        """Sends counts and rows to each rank in one message; see `Ranks`."""
        if counts.is_cuda:
            return super().ask(counts, keys, rows_per_rank)
        head = counts[0].numel()
        parts = [own.sorted.unique.split(counts[:, number, 0].tolist()) for number, own in enumerate(keys)]
        letters = []
        for rank, told_to_rank in enumerate(counts):
            rows = [part[rank] - rank * num_rows for part, num_rows in zip(parts, rows_per_rank, strict=True)]
            letters.append(torch.cat([told_to_rank.flatten(), *rows]))
        with stage("exchange"):
            arrived = self._inbox.exchange(letters)
            both = by_kind(counts, torch.stack([letter[:head].view_as(counts[0]) for letter in arrived]))
            sizes = [both[1][number][0] for number in range(len(keys))]
            wanted = [letter[head:].split([of_key[rank] for of_key in sizes]) for rank, letter in enumerate(arrived)]
            return both, [torch.cat(of_key) for of_key in zip(*wanted, strict=True)]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sums in rank order; see `Ranks`."""
        if values.is_cuda:
            return super().all_reduce(values)
        arrived = self._inbox.exchange([values.clone()[None]] * self.size)
        values.zero_()
        for part in arrived:
            values += part[0]
        return values


def _copy(source: Tensor, target: Tensor) -> Tensor:
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


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """Returns the ranks of a torch process group, or of one process if `group` is None or has one rank.

    If all ranks are on one host, they exchange rows through shared memory. This memory has no name in any file system,
    so nothing is left of it after the ranks have ended, even if they were killed.

    Collective: every rank of `group`.
    """
    if group is None or dist.get_world_size(group) == 1:
        return OneProcess()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own: tuple[mmap.mmap, _Address] | None = None
    timeout_seconds = 0.0
    if os.environ.get(VARIABLE) != "0" and dispatch.cpu_backend() == "native":
        # These errors mean that the system has no memfd, or that the group has no CPU backend.
        with contextlib.suppress(OSError, AttributeError, RuntimeError):
            timeout_seconds = _timeout_seconds(group)
            own = _create(_region_bytes(size))
    through_group = GroupRanks(group)
    addresses = through_group.all_gather(None if own is None else own[1])
    inboxes: list[Inbox] = []
    reason = "a rank has no shared memory"
    if own is not None and None not in addresses:
        try:
            regions, peers = _open_all(rank, own[0], [address for address in addresses if address is not None])
            files, starts = _Files(peers), [number * _inbox_bytes(size) for number in range(_NUM_INBOXES)]
            inboxes = [Inbox(rank, regions, start, files, timeout_seconds=timeout_seconds) for start in starts]
        except (OSError, AttributeError) as error:
            reason = str(error)
    agreed = through_group.all_gather(bool(inboxes))
    if own is not None:
        os.close(own[1].file)
    if all(agreed):
        return SharedMemoryRanks(group, *inboxes)
    if rank == 0:
        _logger.info("ranks exchange rows through the process group, not through shared memory: %s", reason)
    return through_group


def _create(num_bytes: int) -> tuple[mmap.mmap, _Address]:
    file = os.memfd_create(_NAME, os.MFD_CLOEXEC)
    try:
        os.ftruncate(file, num_bytes)
        region = mmap.mmap(file, num_bytes)
    except OSError:
        os.close(file)
        raise
    token = secrets.token_bytes(_TOKEN_BYTES)
    region[:_TOKEN_BYTES] = token
    return region, _Address(os.getpid(), file, token)


def _open_all(rank: int, own: mmap.mmap, addresses: Sequence[_Address]) -> tuple[list[mmap.mmap], list[int]]:
    """Maps the region of every rank, and opens a pidfd of every other rank, which shows if its process dies.

    Raises:
        OSError: a region cannot be opened, because the rank is on another host or in another container.
    """
    regions, peers = [], []
    try:
        for sender, address in enumerate(addresses):
            if sender == rank:
                regions.append(own)
            else:
                peers.append(os.pidfd_open(address.pid))
                regions.append(_open(address, _region_bytes(len(addresses))))
    except OSError:
        for file in peers:
            os.close(file)
        raise
    return regions, peers


def _open(address: _Address, num_bytes: int) -> mmap.mmap:
    path = f"/proc/{address.pid}/fd/{address.file}"
    # If the rank is on another host, this host may have the same pid and descriptor, but not this name and token.
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise FileNotFoundError(f"{path} is not shared memory of this package")
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        region = mmap.mmap(file, num_bytes)
    except ValueError as error:
        raise FileNotFoundError(f"{path} has another size") from error
    finally:
        os.close(file)
    if region[:_TOKEN_BYTES] != address.token:
        raise FileNotFoundError(f"{path} belongs to another job")
    return region


def _header_bytes(world_size: int) -> int:
    table_bytes = 8 * 2 * 2 * world_size  # start and count of the rows for each rank, in two slots
    return -(-(_TABLE_START + table_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def _inbox_bytes(world_size: int) -> int:
    return _header_bytes(world_size) + 2 * _SLOT_BYTES


def _region_bytes(world_size: int) -> int:
    return _NUM_INBOXES * _inbox_bytes(world_size)


def _timeout_seconds(group: dist.ProcessGroup) -> float:
    options = group._get_backend(torch.device("cpu")).options
    return float(options._timeout.total_seconds())
