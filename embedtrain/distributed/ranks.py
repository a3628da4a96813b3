"""The ranks of a job and all communication between them.

The rest of the package uses the interface `Ranks`. It has three implementations: a single process, a torch process
group, and the ranks of one host that share memory (in `embedtrain.distributed.shared_memory`).
"""

from __future__ import annotations

import contextlib
import traceback
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedtrain.distributed.stages import count_sent, stage
from embedtrain.errors import CheckpointError, UserError
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops._backend.transfer import HostCopy, wait_at_most
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.sort_unique import OrderedKeys, SortedKeys

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

_MAX_INT32 = (1 << 31) - 1


class Ranks(ABC):
    """Communicates with the ranks of a job.

    Every method is a collective unless its docstring says otherwise: all ranks must call it, in the same order.

    Attributes:
        rank: number of this rank.
        size: number of ranks.
    """

    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Returns itself, because a copy of tables belongs to the same job."""
        return self

    @abstractmethod
    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """Sends rows to every rank and returns the rows that every rank sent to this one.

        Args:
            rows: [sum(send_counts), ...] contiguous; ordered by receiving rank.
            send_counts: number of rows for each rank.
            receive_counts: number of rows from each rank.

        Returns:
            [sum(receive_counts), ...]; ordered by sending rank. With one process, `rows` itself.
        """

    @abstractmethod
    def all_reduce(self, values: Tensor) -> Tensor:
        """Sums `values` over the ranks in place and returns `values`."""

    def sum(self, value: float, device: torch.device) -> float:
        """Returns the sum of one number per rank; the numbers are exchanged through the memory of `device`."""
        return HostCopy(self.all_reduce(torch.tensor(value, dtype=torch.float64, device=device))).item()

    @abstractmethod
    def broadcast(self, values: Tensor) -> None:
        """Overwrites `values` with the values of rank 0."""

    @abstractmethod
    def all_gather(self, value: T) -> list[T]:
        """Returns the value of every rank, in rank order. A value can be any picklable object."""

    @abstractmethod
    def broadcast_object(self, value: T) -> T:
        """Returns the value of rank 0, which can be any picklable object."""

    @abstractmethod
    def for_thread(self, timeout_seconds: float) -> Ranks:
        """Returns the same ranks with a communicator for one background thread; threads must not share one."""

    @abstractmethod
    def beside(self) -> Ranks:
        """Returns the same ranks with a second communicator.

        On a GPU, collectives of one communicator run one after the other. A second one allows two independent
        sequences.
        """

    @abstractmethod
    def device_mesh(self, device_type: str) -> DeviceMesh | None:
        """Returns the ranks as a mesh for torch's DTensor; None with one process."""

    def all_to_all_split(
        self,
        rows: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        dtype: torch.dtype,
        numbers: Tensor | None = None,
        keep: Callable[[Ranks], object] | None = None,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Sends rows as `all_to_all` does, and optionally a number for each row.

        Args:
            rows: see `all_to_all`.
            send_counts: number of rows for each rank.
            receive_counts: number of rows from each rank.
            dtype: dtype of the returned rows.
            numbers: [sum(send_counts)] float32; a number for each row. None on every rank or on none.
            keep: a method that the next call calls first, with these ranks, if it will overwrite returned rows. It must
                pass the rows that are still needed to `kept`. None if the caller does not need them so long.

        Returns:
            The rows from each rank separately. They may be views of `rows`, or of memory that the next call overwrites.
            And the numbers of these rows, [sum(receive_counts)], ordered by sending rank.
        """
        received = self.all_to_all(rows, send_counts, receive_counts).to(dtype).split(list(receive_counts))
        return list(received), None if numbers is None else self.all_to_all(numbers, send_counts, receive_counts)

    def lending_buffer(self, num_rows: int, dim: int, device: torch.device) -> Tensor | None:
        """Returns memory from which `all_to_all_split` sends rows without copying them; not a collective.

        The caller must not change the rows after it sent them, because other ranks may read them for long.

        Returns:
            [num_rows, dim] float32, uninitialised; None if the ranks have no such memory, or none is free.
        """
        return None

    def kept(self, rows: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Returns rows of `all_to_all_split` in memory that no call overwrites: copies, where necessary.

        Not a collective.
        """
        return list(rows)

    def all_to_all_written(
        self,
        write: Callable[[Sequence[Tensor]], object],
        like: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        *,
        is_kept: bool,
    ) -> list[Tensor]:
        """Sends rows that a function writes directly into the send buffers, which saves a copy.

        Args:
            write: called with one uninitialised buffer per rank, [count, *], which it must fill. It must not
                communicate.
            like: [0, *]; an empty tensor with the shape, dtype and device of the rows.
            send_counts: number of rows for each rank.
            receive_counts: number of rows from each rank.
            is_kept: whether the caller reads the result after the next exchange. If False, the result may be a view of
                the sender's buffer, which the next exchange overwrites.

        Returns:
            The rows from each rank.
        """
        rows = _room(like, sum(send_counts))
        write(rows.split(list(send_counts)))
        return list(self.all_to_all(rows, send_counts, receive_counts).split(list(receive_counts)))

    def all_to_all_gather(
        self,
        source: Tensor,
        rows: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        wire_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> Tensor:
        """Gathers rows of a larger tensor and sends them as `all_to_all` does.

        Args:
            source: [num_rows, dim].
            rows: [sum(send_counts)] int64; row numbers, ordered by receiving rank.
            send_counts: number of rows for each rank.
            receive_counts: number of rows from each rank.
            wire_dtype: dtype of the rows during the exchange.
            dtype: dtype of the result.

        Returns:
            [sum(receive_counts), dim].
        """
        return self.all_to_all(gather_rows(source, rows, wire_dtype), send_counts, receive_counts).to(dtype)

    def ask(
        self, counts: Tensor, keys: Sequence[OrderedKeys | SortedKeys], rows_per_rank: Sequence[int]
    ) -> tuple[list[list[list[list[int]]]], list[Tensor]]:
        """Requests rows from their owners, and exchanges counts that the receivers do not know yet.

        Args:
            counts: [size, m, k] int64; for each rank, m vectors of k counts. Vector i belongs to `keys[i]`: element 0
                is the number of distinct keys that the rank owns, and element 1 is positive if this rank has any key.
                There may be more vectors than sets of keys.
            keys: sets of keys `owner * rows_per_rank + row`. Each distinct key is requested once.
            rows_per_rank: for each set of keys, the number of rows per rank.

        Returns:
            The counts that this rank sent and received, indexed by [sent or received][vector][element][rank]. And for
            each set of keys, the local rows that the ranks request from this one, [n] int64, ordered by requesting
            rank.
        """
        told = self.all_to_all(counts, [1] * self.size, [1] * self.size)
        both = by_kind(counts, told)  # the only wait for the device
        wanted = []
        for number, (ordered, num_rows) in enumerate(zip(keys, rows_per_rank, strict=True)):
            own = ordered.sorted.unique  # no wait: the number of distinct keys reached the host before the counts
            (num_asked, _, *_), (num_owed, is_any, *_) = both[0][number], both[1][number]
            if not any(is_any):
                wanted.append(own.new_zeros(0))
                continue
            # int32 halves the bytes, if the row numbers fit.
            rows = (own % num_rows).to(torch.int32 if num_rows <= _MAX_INT32 else torch.int64)
            wanted.append(self.all_to_all(rows, num_asked, num_owed).long())
        return both, wanted

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns the rows of all ranks, in rank order; differentiable.

        Backward is a collective too. It sums the gradients that the ranks have for a row, in rank order.

        Args:
            rows: [counts[rank], dim]; rows of this rank.
            counts: number of rows of each rank.

        Returns:
            [sum(counts), dim].
        """
        gathered: Tensor = _AllGatherRows.apply(rows, list(counts), self)  # type: ignore[no-untyped-call]
        return gathered

    def fail_together(self, error: BaseException | None) -> None:
        """Raises on every rank if any rank passes an error, so that no rank waits for a failed one.

        A rank that passed an error raises it. The other ranks raise the error of the lowest failing rank. A UserError
        or CheckpointError keeps its class and text; any other error becomes a RuntimeError with the rank and its
        traceback.
        """
        reports = self.all_gather(None if error is None else self._report(error))
        if error is not None:
            raise error
        for found in reports:
            if found is not None:
                error_type, text = found
                raise error_type(text)

    def run_on_each(self, function: Callable[[], T]) -> T:
        """Runs `function` on every rank and returns this rank's result; if it fails on any rank, all ranks raise."""
        try:
            result = function()
        except Exception as error:
            self.fail_together(error)
            raise
        self.fail_together(None)
        return result

    def run_on_first(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0; every rank returns its result or raises its error."""
        result = self.run_on_each(lambda: function() if self.rank == 0 else None)
        return self.broadcast_object(result)  # type: ignore[return-value]

    def lockstep(self, items: Iterable[T]) -> Iterator[T | None]:
        """Yields this rank's items, then None until the items of every rank are used up.

        So all ranks make the same number of steps, and no item is lost. A rank that gets None takes part in the step
        with an empty batch. Every rank must iterate to the end.
        """
        iterator = iter(items)
        while True:
            item = next(iterator, None)
            if self.all_reduce(torch.tensor(float(item is not None))) == 0:
                return
            yield item

    def _report(self, error: BaseException) -> tuple[type[Exception], str]:
        if isinstance(error, UserError | CheckpointError):
            return type(error), str(error)
        trace = "".join(traceback.format_exception(error))
        return RuntimeError, f"rank {self.rank} failed:\n{trace}"


def _room(like: Tensor, count: int) -> Tensor:
    """Returns uninitialised memory for `count` rows like those of a tensor; on a CPU from `empty_buffer`."""
    shape = (count, *like.shape[1:])
    return like.new_empty(shape) if like.is_cuda else empty_buffer(*shape, dtype=like.dtype)


def by_kind(told: Tensor, heard: Tensor) -> list[list[list[list[int]]]]:
    """Returns counts on the host, indexed by [sent or received][vector][element][rank]; see `Ranks.ask`."""
    counts = HostCopy(torch.stack([told, heard])).values()
    both: list[list[list[list[int]]]] = counts.permute(0, 2, 3, 1).tolist()
    return both


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], ranks: Ranks) -> Tensor:
        ctx.counts, ctx.ranks = counts, ranks
        return ranks.all_to_all(rows.repeat(len(counts), 1), [rows.shape[0]] * len(counts), counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        num_rows = ctx.counts[ctx.ranks.rank]
        parts = ctx.ranks.all_to_all(grad, ctx.counts, [num_rows] * len(ctx.counts))
        return parts.view(len(ctx.counts), num_rows, grad.shape[1]).sum(dim=0), None, None


class OneProcess(Ranks):
    """Implements `Ranks` for a job of one process, without communication."""

    rank, size = 0, 1

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """Returns the rows."""
        return rows

    def all_reduce(self, values: Tensor) -> Tensor:
        """Returns the values."""
        return values

    def sum(self, value: float, device: torch.device) -> float:
        """Returns the value."""
        return value

    def broadcast(self, values: Tensor) -> None:
        """Does nothing."""

    def all_gather(self, value: T) -> list[T]:
        """Returns a list of the one value."""
        return [value]

    def broadcast_object(self, value: T) -> T:
        """Returns the value."""
        return value

    def for_thread(self, timeout_seconds: float) -> Ranks:
        """Returns itself."""
        return self

    def beside(self) -> Ranks:
        """Returns itself."""
        return self

    def device_mesh(self, device_type: str) -> None:
        """Returns None."""

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns the rows."""
        return rows

    def fail_together(self, error: BaseException | None) -> None:
        """Raises the error if there is one."""
        if error is not None:
            raise error


ONE_PROCESS = OneProcess()


class _Turns:
    """Makes the collectives of a process's communicators run one after the other on its GPU, as NCCL requires.

    If two ranks started collectives of two communicators in different orders, they would wait for each other forever.
    """

    def __init__(self) -> None:
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @contextlib.contextmanager
    def take(self, tensor: Tensor) -> Iterator[None]:
        """Runs the block, which starts a collective, after the previous collective; no-op for CPU tensors."""
        if not tensor.is_cuda:
            yield
            return
        stream = torch.cuda.current_stream(tensor.device)
        if self._last is not None and self._last[0] != stream:
            stream.wait_event(self._last[1])
        yield
        event = torch.cuda.Event()
        event.record(stream)
        self._last = stream, event


class GroupRanks(Ranks):
    """Implements `Ranks` with a torch process group: Gloo on CPUs, NCCL on GPUs.

    It holds only a weak reference to the group, because Gloo's threads end with the last reference. If a table or an
    optimizer kept the group alive until Python exits, a thread that still releases a tensor could abort the process.

    Args:
        group: the process group, with at least two ranks.
        turns: serialises the collectives of all groups on one GPU; None creates a new one.
    """

    def __init__(self, group: dist.ProcessGroup, *, turns: _Turns | None = None) -> None:
        self._reference = weakref.ref(group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._beside: Ranks | None = None
        self._turns = turns or _Turns()
        if "nccl" in str(dist.get_backend_config(group)):
            wait_at_most(self._timeout().total_seconds())

    @property
    def group(self) -> dist.ProcessGroup:
        """The process group.

        Raises:
            RuntimeError: the group was destroyed.
        """
        group = self._reference()
        if group is None:
            raise RuntimeError("the process group of these tables was destroyed: they belong to a job that has ended")
        return group

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """See `Ranks`."""
        received = _room(rows, sum(receive_counts))
        count_sent((len(rows) - send_counts[self.rank]) * rows.shape[1:].numel() * rows.element_size())
        with stage("exchange"), self._turns.take(rows):
            dist.all_to_all_single(
                received, rows.contiguous(), list(receive_counts), list(send_counts), group=self.group
            )
        return received

    def all_reduce(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        count_sent(2 * (self.size - 1) * values.nbytes // self.size)  # as a ring all-reduce sends
        with self._turns.take(values):
            dist.all_reduce(values, op=dist.ReduceOp.SUM, group=self.group)
        return values

    def broadcast(self, values: Tensor) -> None:
        """See `Ranks`."""
        with self._turns.take(values):
            dist.broadcast(values, group_src=0, group=self.group)

    def all_gather(self, value: T) -> list[T]:
        """See `Ranks`."""
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self.group)
        return gathered

    def broadcast_object(self, value: T) -> T:
        """See `Ranks`."""
        holder = [value]
        dist.broadcast_object_list(holder, group_src=0, group=self.group)
        return holder[0]

    def for_thread(self, timeout_seconds: float) -> Ranks:
        """Returns the ranks of a new Gloo group."""
        ranks = dist.get_process_group_ranks(self.group)
        return GroupRanks(dist.new_group(ranks, timeout=timedelta(seconds=timeout_seconds), backend="gloo"))

    def beside(self) -> Ranks:
        """Returns the ranks of a second NCCL group, which the first call creates; itself without NCCL."""
        if "nccl" not in str(dist.get_backend_config(self.group)):
            return self
        if self._beside is None:
            group = dist.new_group(
                dist.get_process_group_ranks(self.group),
                timeout=self._timeout(),
                use_local_synchronization=True,
                device_id=torch.device("cuda", torch.cuda.current_device()),
            )
            self._beside = GroupRanks(group, turns=self._turns)
        return self._beside

    def _timeout(self) -> timedelta:
        """Returns the timeout of the group's NCCL collectives."""
        timeout: timedelta = self.group._get_backend(torch.device("cuda")).options._timeout
        return timeout

    def device_mesh(self, device_type: str) -> DeviceMesh | None:
        """See `Ranks`."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(self.group, device_type)
