"""What an optimizer and a save tell each other about rows: which changed, and which must still be read as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from embedtrain.embedding.copy_stream import host_blocks
from embedtrain.ops._backend.transfer import catch_up

_BLOCK_BYTES = 4 * 2**20
_CHUNK_BYTES = 8 * 2**20

# What the place of a row says where it is not a position among the preserved rows.
_AWAITED = -1
_DONE = -2


class MemoryBudget:
    """How much memory a save in the background may take beside the tables.

    Attributes:
        limit_bytes: the most; None for no bound.
        used_bytes: taken so far.
        is_exceeded: whether more was asked for than there was.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.is_exceeded = False

    def take(self, num_bytes: int) -> bool:
        """Counts memory about to be allocated; returns False, and counts nothing, where it does not fit."""
        if self.limit_bytes is not None and self.used_bytes + num_bytes > self.limit_bytes:
            self.is_exceeded = True
            return False
        self.used_bytes += num_bytes
        return True


class RowChanges:
    """The rows of a group of tables: told by the optimizer, before each update, which rows it is about to change.

    Attributes:
        tensors: name -> [num_rows, ...], the weights and the optimizer state whose rows change together.
        num_overwritten: how often any row may have been given another value, as by loading.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors
        self.num_overwritten = 0
        self._touched: Tensor | None = None
        self._snapshot: RowSnapshot | None = None

    @property
    def num_rows(self) -> int:
        """Returns the number of rows of each tensor."""
        return len(next(iter(self.tensors.values())))

    @property
    def device(self) -> torch.device:
        """Returns where the tensors live."""
        return next(iter(self.tensors.values())).device

    @property
    def is_watched(self) -> bool:
        """Returns whether anybody needs to be told of updates."""
        return self._touched is not None or self._snapshot is not None

    def track(self) -> None:
        """Begins to note which rows are touched: one byte a row. Nothing where it has begun."""
        if self._touched is None:
            self._touched = torch.zeros(self.num_rows, dtype=torch.bool, device=self.device)

    def before_update(self, rows: Tensor) -> None:
        """Takes note of the local rows [n] int64 that the next update changes; called before it changes them."""
        if self._touched is not None:
            self._touched.index_fill_(0, rows, True)
        if self._snapshot is not None:
            self._snapshot.preserve(rows)

    def before_update_of_all(self) -> None:
        """Takes note that any row may change, as by loading values."""
        self.num_overwritten += 1
        if self._touched is not None:
            self._touched.fill_(True)
        if self._snapshot is not None:
            self._snapshot.wait_until_staged()

    def touched_since_last_taken(self) -> Tensor | None:
        """Returns [num_rows] bool, and begins anew; None where rows are not tracked."""
        if self._touched is None:
            return None
        taken, self._touched = self._touched, torch.zeros_like(self._touched)
        return taken

    def snapshot(self, budget: MemoryBudget, awaited: Tensor | None) -> RowSnapshot:
        """Returns the rows as they are now, to be read while updates go on; ends with `release`.

        Args:
            budget: bounds the memory that it takes.
            awaited: [num_rows] bool, the rows that will be read; None for all.
        """
        self._snapshot = RowSnapshot(self.tensors, budget, awaited)
        return self._snapshot

    def release(self) -> None:
        """Ends the snapshot and lets go of its memory."""
        if self._snapshot is not None:
            self._snapshot.finish()
            self._snapshot = None


class RowSnapshot:
    """Rows as they were at one moment, read by a thread while an optimizer goes on changing them.

    Copy on write by rows: before an update, the rows that it changes and that were not read yet are copied
    aside. So training waits for the copies of touched rows only, and memory grows with the rows touched
    during the save, not with the tables. Where the budget does not suffice, the update waits until all rows
    were read.

    On a GPU rows are copied aside on the device's default stream, under the lock, hence in order; what is copied goes
    to the host beside that stream.
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
        """Copies those of the local rows [n] aside that are still to be read; waits where they do not fit."""
        if self._staged.is_set():
            return
        catch_up(rows.device)
        with self._lock:
            fits = self._has_places and self._keep(rows[self._place[rows] == _AWAITED])
        if not fits:
            self._staged.wait()

    def wait_until_staged(self) -> None:
        """Waits until all rows were read, or reading ended otherwise."""
        self._staged.wait()

    def finish(self) -> None:
        """Has nobody wait for the snapshot any longer: all rows were read, or reading failed."""
        self._staged.set()

    def blocks(self, name: str, rows: range | Tensor, *, is_last: bool) -> Iterator[Tensor]:
        """Yields rows of a tensor, in order, in CPU blocks of about 4 MiB, each valid until the next.

        Args:
            name: the tensor.
            rows: consecutive local rows, or [n] int64 on the tensors' device.
            is_last: whether these rows of all other tensors were read before.
        """
        return host_blocks(self._blocks(name, rows, is_last), self._tensors[name].device)

    def _blocks(self, name: str, rows: range | Tensor, is_last: bool) -> Iterator[Tensor]:
        """Yields the blocks where the tensors are; on the CPU each is valid until the next."""
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
        """Copies rows to the ends of the chunks; returns False where the budget does not allow for all."""
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
