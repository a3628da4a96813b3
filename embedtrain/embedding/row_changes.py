"""Tracks changed rows for incremental saves, and preserves rows for a save that runs during training."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from embedtrain.embedding.copy_stream import host_blocks
from embedtrain.ops._backend.transfer import catch_up

_BLOCK_BYTES = 4 * 2**20
_CHUNK_BYTES = 8 * 2**20

# Values of `RowSnapshot._place` for rows that are not preserved.
_AWAITED = -1
_DONE = -2


class MemoryBudget:
    """Limits the memory that a background save takes in addition to the tables.

    Attributes:
        limit_bytes: maximum memory; None for no limit.
        used_bytes: memory taken so far.
        is_exceeded: whether a request did not fit.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.is_exceeded = False

    def take(self, num_bytes: int) -> bool:
        """Counts memory that is about to be allocated; returns False and counts nothing if it does not fit."""
        if self.limit_bytes is not None and self.used_bytes + num_bytes > self.limit_bytes:
            self.is_exceeded = True
            return False
        self.used_bytes += num_bytes
        return True


class RowChanges:
    """Records which rows of a table group change; the optimizer calls `before_update` before each update.

    Attributes:
        tensors: by name [num_rows, ...]; weights and optimizer state, whose rows change together.
        num_overwritten: number of times that any row may have been overwritten, for example by loading.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.num_overwritten = 0
        self._touched: Tensor | None = None
        self._snapshot: RowSnapshot | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows of each tensor."""
        return len(next(iter(self.tensors.values())))

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return next(iter(self.tensors.values())).device

    @property
    def is_watched(self) -> bool:
        """Whether updates must be reported, because rows are tracked or a snapshot is open."""
        return self._touched is not None or self._snapshot is not None

    def track(self) -> None:
        """Starts tracking which rows are touched, with one byte per row. No-op if already tracking."""
        if self._touched is None:
            self._touched = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)

    def before_update(self, rows: Tensor) -> None:
        """Records the local rows [n] int64 that the next update changes; must be called before the update."""
        if self._touched is not None:
            self._touched.index_fill_(0, rows, True)
        if self._snapshot is not None:
            self._snapshot.preserve(rows)

    def before_update_of_all(self) -> None:
        """Records that any row may change, for example by loading values."""
        self.num_overwritten += 1
        if self._touched is not None:
            self._touched.fill_(True)
        if self._snapshot is not None:
            self._snapshot.wait_until_staged()

    def touched_since_last_taken(self) -> Tensor | None:
        """Returns the touched rows, [num_rows] bool, and resets them; None if rows are not tracked."""
        if self._touched is None:
            return None
        taken, self._touched = self._touched, torch.zeros_like(self._touched)
        return taken

    def snapshot(self, budget: MemoryBudget, awaited: Tensor | None) -> RowSnapshot:
        """Opens a snapshot of the rows, which can be read during updates; `release` ends it.

        Args:
            budget: limit of the snapshot's memory.
            awaited: [num_rows] bool, the rows that will be read; None for all.
        """
        self._snapshot = RowSnapshot(self.tensors, budget, awaited)
        return self._snapshot

    def release(self) -> None:
        """Ends the snapshot and frees its memory."""
        if self._snapshot is not None:
            self._snapshot.finish()
            self._snapshot = None


class RowSnapshot:
    """Holds rows at one moment, so that a thread can read them while an optimizer changes them.

    It is copy-on-write per row: before an update, the rows that it changes are preserved if they were not read yet. So
    training waits only for copies of touched rows, and memory grows with the rows touched during the save. If the
    budget is exhausted, the update waits until all rows are read.

    On a GPU, rows are preserved on the device's default stream under a lock, so preserving and reading are ordered.
    Copies to the host use another stream.

    Args:
        tensors: weights and optimizer state by name.
        budget: limit of the memory for preserved rows.
        awaited: [num_rows] bool, the rows that will be read; None for all.
    """

    def __init__(self, tensors: dict[str, Tensor], budget: MemoryBudget, awaited: Tensor | None) -> None:
        first = next(iter(tensors.values()))
        self._tensors = dict(tensors)
        self._budget = budget
        self._lock = threading.Lock()
        self._staged = threading.Event()
        self._row_bytes = sum(tensor[:1].nbytes for tensor in tensors.values())
        self._chunk_rows = max(1, _CHUNK_BYTES // self._row_bytes)
        self._chunks: list[dict[str, Tensor]] = []
        self._num_preserved = 0
        self._has_places = budget.take(4 * len(first))
        if not self._has_places:
            self._place = torch.empty(0, dtype=torch.int32)
            return
        self._place = torch.full((len(first),), _AWAITED, dtype=torch.int32, device=first.device)
        if awaited is not None:
            self._place.masked_fill_(~awaited, _DONE)

    def preserve(self, rows: Tensor) -> None:
        """Preserves the local rows [n] that are still to be read; if they do not fit, waits until all rows are read."""
        if self._staged.is_set():
            return
        catch_up(rows.device)
        with self._lock:
            fits = self._has_places and self._keep(rows[self._place[rows] == _AWAITED])
        if not fits:
            self._staged.wait()

    def wait_until_staged(self) -> None:
        """Waits until all rows are read, or reading has failed."""
        self._staged.wait()

    def finish(self) -> None:
        """Releases waiting updates, because all rows are read or reading has failed."""
        self._staged.set()

    def blocks(self, name: str, rows: range | Tensor, *, is_last: bool) -> Iterator[Tensor]:
        """Yields rows of a tensor, in order, in CPU blocks of about 4 MiB, each valid until the next.

        Args:
            name: name of the tensor.
            rows: consecutive local rows, or [n] int64 on the device of the tensors.
            is_last: whether these rows have been read of all other tensors, so that they are no longer preserved.
        """
        return host_blocks(self._blocks(name, rows, is_last), self._tensors[name].device)

    def _blocks(self, name: str, rows: range | Tensor, is_last: bool) -> Iterator[Tensor]:
        """Yields the blocks on the device of the tensors; on the CPU each is valid until the next."""
        tensor = self._tensors[name]
        block_rows = max(1, _BLOCK_BYTES // max(1, tensor[:1].nbytes))
        buffer: Tensor | None = None
        for first in range(0, len(rows), block_rows):
            part = rows[first : first + block_rows]
            if buffer is None or tensor.is_cuda:
                buffer = tensor.new_empty((min(block_rows, len(rows)), *tensor.shape[1:]))
            block = buffer[: len(part)]
            with self._lock:
                self._copy(name, slice(part.start, part.stop) if isinstance(part, range) else part, block, is_last)
            yield block

    def _copy(self, name: str, rows: slice | Tensor, block: Tensor, is_last: bool) -> None:
        if isinstance(rows, slice):
            block.copy_(self._tensors[name][rows])
        else:
            torch.index_select(self._tensors[name], 0, rows, out=block)
        if not self._has_places:
            return
        catch_up(block.device)
        place = self._place[rows]
        preserved = (place >= 0).nonzero().squeeze(1)
        if preserved.numel():
            position = place[preserved].long()
            number = position // self._chunk_rows
            for chunk in number.unique().tolist():
                mine = number == chunk
                block[preserved[mine]] = self._chunks[chunk][name][position[mine] % self._chunk_rows]
        if is_last:
            self._place[rows] = _DONE

    def _keep(self, rows: Tensor) -> bool:
        """Appends rows to the chunks; returns False if the budget is exhausted."""
        while rows.numel():
            used = self._num_preserved % self._chunk_rows
            if used == 0 and not self._add_chunk():
                return False
            some = rows[: self._chunk_rows - used]
            stop = used + len(some)
            for name, kept in self._chunks[-1].items():
                torch.index_select(self._tensors[name], 0, some, out=kept[used:stop])
            positions = torch.arange(self._num_preserved, self._num_preserved + len(some), dtype=torch.int32)
            self._place[some] = positions.to(self._place.device)
            self._num_preserved += len(some)
            rows = rows[len(some) :]
        return True

    def _add_chunk(self) -> bool:
        if not self._budget.take(self._chunk_rows * self._row_bytes):
            return False
        self._chunks.append(
            {name: tensor.new_empty((self._chunk_rows, *tensor.shape[1:])) for name, tensor in self._tensors.items()}
        )
        return True
