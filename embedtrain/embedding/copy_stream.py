"""Copies of rows between host memory and a device, beside the stream that computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from embedtrain.ops._backend.transfer import HostCopy, wait_for
from embedtrain.ops.gather_rows import gather_rows

_STAGING_BYTES = 16 << 20
"""Of each of the two buffers that a large table is copied through: pinned memory is rounded up to powers of two, and a
copy of half a device's memory would take more than many a host has."""


class CopyStream:
    """A stream of a device for copies alone; on the CPU there is nothing to copy.

    Args:
        device: of the rows.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def gather(self, host: Tensor, rows: Tensor) -> Tensor:
        """Returns rows of a tensor in host memory on the device; the current stream waits for them, not the host.

        Args:
            host: [num_rows] or [num_rows, dim].
            rows: [n] int64 on the host.
        """
        if self._stream is None:
            return _gathered(host, rows, None)
        pinned = torch.empty((rows.numel(), *host.shape[1:]), dtype=host.dtype, pin_memory=True)
        _gathered(host, rows, pinned)
        main = torch.cuda.current_stream(self._device)
        with self._entered():
            copied = pinned.to(self._device, non_blocking=True)
        main.wait_stream(self._stream)
        copied.record_stream(main)
        return copied

    def to_host(self, values: Tensor) -> HostCopy:
        """Begins to copy what the current stream computes to the host."""
        if self._stream is None:
            return HostCopy(values)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._entered():
            copy = HostCopy(values)
        values.record_stream(self._stream)
        return copy

    def join(self) -> None:
        """Has the current stream wait for all copies so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def gather_chunks(self, host: Tensor, rows: Tensor) -> Tensor:
        """Returns what `gather` does, for more rows than may lie in pinned memory at once."""
        if self._stream is None:
            return _gathered(host, rows, None)
        copied = torch.empty((rows.numel(), *host.shape[1:]), dtype=host.dtype, device=self._device)
        main = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(main)
        copied.record_stream(self._stream)
        chunk_rows = max(1, _STAGING_BYTES // max(1, host[:1].nbytes))
        shape = (min(chunk_rows, rows.numel()), *host.shape[1:])
        buffers = [torch.empty(shape, dtype=host.dtype, pin_memory=True) for _ in range(2)]
        is_free = [torch.cuda.Event(), torch.cuda.Event()]
        for number, some in enumerate(rows.split(chunk_rows)):
            turn = number % 2
            wait_for(is_free[turn])  # at once for an event that was never recorded
            buffer = _gathered(host, some, buffers[turn][: some.numel()])
            with self._entered():
                first = number * chunk_rows
                copied[first : first + some.numel()].copy_(buffer, non_blocking=True)
                is_free[turn].record(self._stream)
        main.wait_stream(self._stream)
        return copied

    def _entered(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def host_blocks(blocks: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yields blocks of a device in host memory; each is valid until the next.

    A block travels while the one before it is used, beside the stream that computes, which has made it.

    Args:
        blocks: each a tensor of its own if they are on a GPU.
        device: of the blocks.
    """
    if device.type == "cpu":
        yield from blocks
        return
    stream = CopyStream(device)
    under_way: list[HostCopy] = []
    for block in blocks:
        under_way.append(stream.to_host(block))
        if len(under_way) > 1:
            yield under_way.pop(0).values()
    for copy in under_way:
        yield copy.values()


def _gathered(host: Tensor, rows: Tensor, out: Tensor | None) -> Tensor:
    """Returns rows of a tensor in host memory, in `out` if it is given."""
    if host.dim() == 2:
        return gather_rows(host, rows, out=out)
    return torch.index_select(host, 0, rows) if out is None else torch.index_select(host, 0, rows, out=out)
