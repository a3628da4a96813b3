"""All-to-all between ranks of one host through shared memory, for ranks that have a core each."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import math
import mmap
import os
import tempfile
import time
from array import array
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from embedtrain.distributed.runtime import rank_of, size_of
from embedtrain.ops import dispatch

VARIABLE = "EMBEDTRAIN_SHARED_MEMORY"
"""Environment variable: 1 asks for it. Ranks that wait here spin: where they have no core each, that costs more than
the process group's sockets do."""

_FOLDER = "/dev/shm"
_HEADER_BYTES = 128
_RING_BYTES = 1 << 20  # stays in the cache while it is written by one rank and read by the other
_RING_STRIDE = 4096 + _RING_BYTES  # whole pages
_PATIENCE_MS = 50
_WORDS = 6  # of the kernel's `Peer`


class SharedMemoryExchange:
    """Rings in shared memory, one for each ordered pair of ranks.

    Made by `connect`, which knows whether the ranks share a host. A rank's file holds the rings that it writes to,
    and is locked while the rank lives: that is how its peers, which wait for nothing else, see that it died.
    """

    def __init__(self, group: dist.ProcessGroup, own: int, paths: Sequence[str]) -> None:
        self._rank, self._size = rank_of(group), size_of(group)
        self._own = own
        self._timeout_seconds = _timeout_seconds(group)
        self._files = [os.open(path, os.O_RDWR) for path in paths]
        self._maps = [mmap.mmap(file, self._size * _RING_STRIDE) for file in self._files]
        # The addresses hold as long as the maps do.
        views = [ctypes.c_char.from_buffer(each) for each in self._maps]
        self._addresses = [ctypes.addressof(view) for view in views]
        self._views = views

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """See `collectives.all_to_all_rows`.

        Raises:
            RuntimeError: a peer died, or did not come before the group's time-out.
        """
        from embedtrain.ops.native import library

        rows = rows.contiguous()
        row_bytes = rows.element_size() * math.prod(rows.shape[1:])
        received = rows.new_empty((sum(receive_counts), *rows.shape[1:]))
        words: list[int] = []
        sent_at, received_at = rows.data_ptr(), received.data_ptr()
        for peer, (to_send, to_receive) in enumerate(zip(send_counts, receive_counts, strict=True)):
            if peer == self._rank:
                ctypes.memmove(received_at, sent_at, to_send * row_bytes)
            else:
                words += (self._ring(self._rank, peer), self._ring(peer, self._rank))
                words += (sent_at, to_send * row_bytes, received_at, to_receive * row_bytes)
            sent_at += to_send * row_bytes
            received_at += to_receive * row_bytes
        peers = array("q", words)
        is_done = ctypes.c_int64()
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            library.get().embedtrain_ring_exchange(
                peers.buffer_info()[0], self._size - 1, _RING_BYTES, _PATIENCE_MS, ctypes.addressof(is_done)
            )
            if is_done.value:
                return received
            self._check_peers(peers, deadline)

    def _ring(self, writer: int, reader: int) -> int:
        return self._addresses[writer] + reader * _RING_STRIDE

    def _check_peers(self, peers: array[int], deadline: float) -> None:
        others = [rank for rank in range(self._size) if rank != self._rank]
        waiting = [rank for i, rank in enumerate(others) if peers[i * _WORDS + 3] or peers[i * _WORDS + 5]]
        for rank in waiting:
            if not _is_locked(self._files[rank]):
                raise RuntimeError(f"rank {rank} is gone: rank {self._rank} waited for its rows")
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"rank {self._rank} waited {self._timeout_seconds:.0f} s for rows of the ranks {waiting}"
            )

    def __del__(self) -> None:
        for file in [*getattr(self, "_files", ()), self._own]:
            with contextlib.suppress(OSError):
                os.close(file)


def connect(group: dist.ProcessGroup | None, device: torch.device) -> SharedMemoryExchange | None:
    """Returns an exchange through shared memory, or None where any two ranks do not share memory or do not want it.

    Collective: every rank of `group`.
    """
    if group is None or size_of(group) == 1:
        return None
    own = -1
    path: str | None = None
    is_wanted = device.type == "cpu" and os.environ.get(VARIABLE) == "1" and dispatch.cpu_backend() == "native"
    if is_wanted:
        with contextlib.suppress(OSError):
            own, path = _create(size_of(group) * _RING_STRIDE)
    paths: list[str | None] = [None] * size_of(group)
    dist.all_gather_object(paths, path, group=group)
    exchange = None
    with contextlib.suppress(OSError):
        # A path of another host does not exist here: names are random.
        if None not in paths:
            exchange = SharedMemoryExchange(group, own, [name for name in paths if name is not None])
    agreed: list[bool] = [False] * size_of(group)
    dist.all_gather_object(agreed, exchange is not None, group=group)
    if path is not None:
        os.unlink(path)  # the open files keep the memory, and nothing is left behind
    if all(agreed):
        return exchange
    if exchange is None and own >= 0:
        os.close(own)
    return None


def _create(num_bytes: int) -> tuple[int, str]:
    file, path = tempfile.mkstemp(prefix="embedtrain-", dir=_FOLDER)
    try:
        os.posix_fallocate(file, 0, num_bytes)  # reserved now: a full file system would kill the writer later
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        os.close(file)
        os.unlink(path)
        raise
    return file, path


def _is_locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def _timeout_seconds(group: dist.ProcessGroup) -> float:
    options = group._get_backend(torch.device("cpu")).options
    return float(options._timeout.total_seconds())
