"""Copies rows between host memory and a device on a CUDA stream of its own, in parallel to computation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from embedtrain.ops._backend.transfer import HostCopy, wait_for
from embedtrain.ops.gather_rows import gather_rows

_STAGING_BYTES = 16 << 20
"""Size of each of the two pinned buffers through which a large table is copied. A single large buffer could exceed host
memory, because torch rounds pinned memory up to a power of two."""


class CopyStream:
    """Holds a stream of a device for copies; on the CPU rows are gathered without a stream.

    Args:
        device: device to which rows are copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def gather(self, host: Tensor, rows: Tensor) -> Tensor:
        """Copies rows of a tensor in host memory to the device; only the current stream waits for the copy.

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
        """Starts to copy values that the current stream computes to the host."""
        if self._stream is None:
            return HostCopy(values)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with self._entered():
            copy = HostCopy(values)
        values.record_stream(self._stream)
        return copy

    def join(self) -> None:
        """Makes the current stream wait for all copies started so far."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def gather_chunks(self, host: Tensor, rows: Tensor) -> Tensor:
        """Returns the result of `gather`, for more rows than fit into pinned memory at once."""
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
            wait_for(is_free[turn])  # returns at once for an event that was never recorded
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
    """Copies blocks from a device to host memory and yields them; each block is valid until the next.

    The next block is copied while the caller uses the current one.

    Args:
        blocks: made by the current stream; on a GPU each block must be a separate tensor.
        device: device of the blocks.
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
    """Returns rows of a tensor in host memory, written to `out` if it is not None."""
    if host.dim() == 2:
        return gather_rows(host, rows, out=out)
    return torch.index_select(host, 0, rows) if out is None else torch.index_select(host, 0, rows, out=out)
