"""Exchanges rows between the ranks of one host through shared memory, which receivers read in place."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from embedtrain.distributed.inbox import Inbox, copy_rows, inbox_bytes, lies_in
from embedtrain.distributed.ranks import GroupRanks, OneProcess, Ranks, by_kind
from embedtrain.distributed.shared_regions import Address, create, open_all
from embedtrain.distributed.stages import stage
from embedtrain.ops._backend import dispatch
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.sort_unique import OrderedKeys, SortedKeys

VARIABLE = "EMBEDTRAIN_SHARED_MEMORY"
"""Environment variable: 0 makes the ranks of one host exchange rows through the process group."""

_NUM_AREAS = 4
"""Gradients that a rank can lend at a time. A table group needs two: for the last step and for the step in progress."""
_SMALLEST_LENT_BYTES = 1 << 20
"""Smaller gradients are copied, because each one that is lent takes a huge page at least."""

_logger = logging.getLogger(__name__)


class SharedMemoryRanks(GroupRanks):
    """Implements `Ranks` for the ranks of one host; GPU tensors and objects still go through the process group.

    Args:
        group: the process group.
        inbox: the shared memory.
        gradients: shared memory for rows that are read in place, also during exchanges through `inbox`.
    """

    def __init__(self, group: dist.ProcessGroup, inbox: Inbox, gradients: Inbox) -> None:
        super().__init__(group)
        self._inbox, self._gradients = inbox, gradients
        self._keep: weakref.WeakMethod[Callable[[Ranks], object]] | None = None

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """See `Ranks`."""
        if rows.is_cuda:
            return super().all_to_all(rows, send_counts, receive_counts)
        with stage("exchange"):
            received = empty_buffer(sum(receive_counts), *rows.shape[1:], dtype=rows.dtype)
            arrived = self._inbox.exchange(rows.split(list(send_counts)))
            for target, part in zip(received.split(list(receive_counts)), arrived, strict=True):
                copy_rows(part, target)
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
        row_shape, row_bytes = rows.shape[1:], math.prod(rows.shape[1:]) * rows.element_size()
        areas = [area for area in self._gradients.areas if lies_in(rows, area.memory) and rows.is_contiguous()]
        area = areas[0] if areas else None

        def opened(letter: Tensor, count: int) -> tuple[Tensor, Tensor]:
            """Returns the numbers and the rows of a letter; the numbers are first, because of their alignment."""
            of_numbers, of_rows = letter.split([count * number_bytes, len(letter) - count * number_bytes])
            return of_numbers.view(torch.float32), of_rows.view(rows.dtype).view(count, *row_shape)

        def received(rank: int, letter: Tensor, count: int) -> tuple[Tensor, Tensor]:
            borrowed = self._gradients.borrowed(rank, count, row_shape, rows.dtype)
            return opened(letter, count) if borrowed is None else (letter.view(torch.float32), borrowed)

        with stage("exchange"):
            own_rows = rows.split(list(send_counts))
            nothing = [rows.new_empty(0, dtype=torch.float32)] * self.size
            own_numbers = nothing if numbers is None else numbers.split(list(send_counts))
            bytes_per_count = number_bytes + (row_bytes if area is None else 0)
            rooms = self._gradients.rooms([count * bytes_per_count for count in send_counts], (), torch.uint8)
            for rank, count in enumerate(send_counts):
                if rank == self.rank:
                    continue
                if area is None:
                    room_of_numbers, room_of_rows = opened(rooms[rank], count)
                    copy_rows(own_rows[rank], room_of_rows)
                else:
                    room_of_numbers = rooms[rank].view(torch.float32)
                room_of_numbers.copy_(own_numbers[rank])
            if area is not None:
                self._gradients.lend(area, own_rows)
            self._gradients.send()
            letters = self._gradients.receive((), torch.uint8)
            arrived = [
                (own_numbers[rank], own_rows[rank]) if rank == self.rank else received(rank, letters[rank], count)
                for rank, count in enumerate(receive_counts)
            ]
            parts = [of_rows.to(dtype) for _, of_rows in arrived]
            return parts, None if numbers is None else torch.cat([of_numbers for of_numbers, _ in arrived])

    def lending_buffer(self, num_rows: int, dim: int, device: torch.device) -> Tensor | None:
        """See `Ranks`; None for few rows, whose copies are cheap."""
        if device.type != "cpu" or 4 * num_rows * dim < _SMALLEST_LENT_BYTES:
            return None
        for area in self._gradients.areas:
            could_lend = area.why_not is None
            buffer = area.buffer((num_rows, dim), self._gradients.num_complete)
            if buffer is not None:
                return buffer
            if could_lend and area.why_not is not None:
                _logger.info("this rank's gradients are copied to other ranks: %s", area.why_not)
        return None

    def kept(self, rows: Sequence[Tensor | None]) -> list[Tensor | None]:
        """See `Ranks`."""
        return [part.clone() if part is not None and self._gradients.was_received(part) else part for part in rows]

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
                arrived = [copy_rows(part, empty_buffer(*part.shape, dtype=dtype)) for part in arrived]
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
                    copy_rows(arrived, targets[rank])
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
        first, *others = self._inbox.exchange([values.clone()[None]] * self.size)
        values.copy_(first[0])
        for part in others:
            values += part[0]
        return values


def ranks_of(group: dist.ProcessGroup | None) -> Ranks:
    """Returns the ranks of a torch process group, or of one process if `group` is None or has one rank.

    If all ranks are on one host, they exchange rows through shared memory. This memory has no name in any file system,
    so nothing is left of it after the ranks have ended, even if they were killed.

    Collective: every rank of `group`.
    """
    if group is None or dist.get_world_size(group) == 1:
        return OneProcess()
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sizes = [inbox_bytes(size, num_areas) for num_areas in (0, _NUM_AREAS)]
    own: tuple[memoryview, Address] | None = None
    timeout_seconds = 0.0
    if os.environ.get(VARIABLE) != "0" and dispatch.cpu_backend() == "native":
        # These errors mean that the system has no memfd, or that the group has no CPU backend.
        with contextlib.suppress(OSError, AttributeError, RuntimeError):
            timeout_seconds = _timeout_seconds(group)
            own = create(sum(sizes))
    through_group = GroupRanks(group)
    addresses = through_group.all_gather(None if own is None else own[1])
    inboxes: list[Inbox] = []
    reason = "a rank has no shared memory"
    if own is not None and None not in addresses:
        try:
            known = [address for address in addresses if address is not None]
            regions, peers = open_all(rank, own[0], known, len(own[0]))
            options = {"timeout_seconds": timeout_seconds}
            inboxes = [
                Inbox(rank, regions, 0, peers, num_areas=0, **options),
                Inbox(rank, regions, sizes[0], peers, num_areas=_NUM_AREAS, **options),
            ]
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


def _timeout_seconds(group: dist.ProcessGroup) -> float:
    options = group._get_backend(torch.device("cpu")).options
    return float(options._timeout.total_seconds())
