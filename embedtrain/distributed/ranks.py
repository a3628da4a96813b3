"""The ranks that work together, and every way in which they communicate.

`Ranks` is what the rest of the package knows. One process is an implementation of it, as are a process group of torch
and, in `embedtrain.distributed.shared_memory`, the ranks of one host.
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
    """The ranks of a job, as one of them sees them.

    Every method is collective unless it says otherwise: every rank calls it, in the same order.

    Attributes:
        rank: this rank's number.
        size: how many ranks there are.
    """

    rank: int
    size: int

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Returns itself: a copy of tables belongs to the same job."""
        return self

    @abstractmethod
    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """Sends consecutive runs of rows to the ranks in order, and returns what they sent, by rank.

        Args:
            rows: [sum(send_counts), ...] contiguous.
            send_counts: rows for each rank.
            receive_counts: rows from each rank.

        Returns:
            [sum(receive_counts), ...]; of one process, `rows` itself.
        """

    @abstractmethod
    def all_reduce(self, values: Tensor) -> Tensor:
        """Sums `values` over the ranks, in place, and returns them."""

    def sum(self, value: float, device: torch.device) -> float:
        """Returns the sum of one number per rank, which travels from the memory of `device`."""
        return HostCopy(self.all_reduce(torch.tensor(value, dtype=torch.float64, device=device))).item()

    @abstractmethod
    def broadcast(self, values: Tensor) -> None:
        """Overwrites `values` with those of rank 0."""

    @abstractmethod
    def all_gather(self, value: T) -> list[T]:
        """Returns the ranks' values, any objects that pickle takes, in rank order."""

    @abstractmethod
    def broadcast_object(self, value: T) -> T:
        """Returns the value of rank 0, any object that pickle takes."""

    @abstractmethod
    def for_thread(self, timeout_seconds: float) -> Ranks:
        """Returns the same ranks for one background thread, which must not share these with the main one."""

    @abstractmethod
    def beside(self) -> Ranks:
        """Returns the same ranks for collectives that run beside these on a GPU, where those of one go one by one."""

    @abstractmethod
    def device_mesh(self, device_type: str) -> DeviceMesh | None:
        """Returns the ranks as torch's DTensor wants them; None of one process."""

    def all_to_all_split(
        self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int], dtype: torch.dtype
    ) -> list[Tensor]:
        """Sends rows as `all_to_all` does, and returns what came from each rank, as `dtype`.

        What this rank sends itself may be a view of `rows`.
        """
        return list(self.all_to_all(rows, send_counts, receive_counts).to(dtype).split(list(receive_counts)))

    def all_to_all_written(
        self,
        write: Callable[[Sequence[Tensor]], object],
        like: Tensor,
        send_counts: Sequence[int],
        receive_counts: Sequence[int],
        *,
        is_kept: bool,
    ) -> list[Tensor]:
        """Sends rows that are written straight to where they travel from.

        Args:
            write: called with uninitialised memory for each rank, [count, *], which it fills; it does not communicate.
            like: [0, *]; shape, dtype and device of the rows.
            send_counts: rows for each rank.
            receive_counts: rows from each rank.
            is_kept: whether the caller reads what came after the next exchange too; else it may lie in the memory of
                its sender, which writes to it again then.

        Returns:
            What came from each rank.
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
        """Sends rows of a larger tensor, as `all_to_all` does.

        Args:
            source: [num_rows, dim].
            rows: [sum(send_counts)] int64; which rows, by receiving rank.
            send_counts: rows for each rank.
            receive_counts: rows from each rank.
            wire_dtype: in which they travel.
            dtype: of the result.

        Returns:
            [sum(receive_counts), dim].
        """
        return self.all_to_all(gather_rows(source, rows, wire_dtype), send_counts, receive_counts).to(dtype)

    def ask(
        self, counts: Tensor, keys: Sequence[OrderedKeys | SortedKeys], rows_per_rank: Sequence[int]
    ) -> tuple[list[list[list[list[int]]]], list[Tensor]]:
        """Tells the ranks which of their rows this rank wants, and some numbers, of which receivers know nothing yet.

        Args:
            counts: [size, numbers, kinds] int64; what this rank tells each. For each of `keys`, which the first numbers
                belong to, kind 0 is how many of the keys are a rank's, and kind 1 is positive if there is any key.
            keys: per number the keys `owner * rows_per_rank + row`; each distinct one is asked for once.
            rows_per_rank: per number the rows of a rank.

        Returns:
            What this rank told and was told: told or was told, number, kind and rank. And for each of `keys` the rows
            that the ranks want of this one, [n] int64, by asking rank.
        """
        told = self.all_to_all(counts, [1] * self.size, [1] * self.size)
        both = by_kind(counts, told)  # the one wait for the device
        wanted = []
        for number, (ordered, num_rows) in enumerate(zip(keys, rows_per_rank, strict=True)):
            own = ordered.sorted.unique  # how many there are came to the host before the counts did
            (num_asked, _, *_), (num_owed, is_any, *_) = both[0][number], both[1][number]
            if not any(is_any):
                wanted.append(own.new_zeros(0))
                continue
            # Half the bytes, if local rows fit.
            rows = (own % num_rows).to(torch.int32 if num_rows <= _MAX_INT32 else torch.int64)
            wanted.append(self.all_to_all(rows, num_asked, num_owed).long())
        return both, wanted

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Returns the rows of every rank, in rank order, with gradients that find their way back.

        Backward, which is collective too, sums the gradients that the ranks have for a row, in rank order.

        Args:
            rows: [counts[rank], dim].
            counts: rows of each rank.

        Returns:
            [sum(counts), dim].
        """
        gathered: Tensor = _AllGatherRows.apply(rows, list(counts), self)  # type: ignore[no-untyped-call]
        return gathered

    def fail_together(self, error: BaseException | None) -> None:
        """Raises on every rank if any rank passes an error, so that no rank is left waiting for it.

        A rank with an error of its own raises that. The others raise what the lowest failing rank reports: the same
        class and text for an error that is written for users, else a RuntimeError with the rank and its traceback.
        """
        reports = self.all_gather(None if error is None else self._report(error))
        if error is not None:
            raise error
        for found in reports:
            if found is not None:
                error_type, text = found
                raise error_type(text)

    def run_on_each(self, function: Callable[[], T]) -> T:
        """Runs `function` on every rank and returns this rank's result, or raises on all what failed on any."""
        try:
            result = function()
        except Exception as error:
            self.fail_together(error)
            raise
        self.fail_together(None)
        return result

    def run_on_first(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 and returns its result, or raises its error, on every rank."""
        result = self.run_on_each(lambda: function() if self.rank == 0 else None)
        return self.broadcast_object(result)  # type: ignore[return-value]

    def lockstep(self, items: Iterable[T]) -> Iterator[T | None]:
        """Yields this rank's items, and None once they have run out, until those of every rank have.

        A rank that is given None takes part in the step with an empty batch: every rank makes the same number of
        steps, no item is left out, and no rank waits for one that has finished. Every rank iterates to the end.
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
    """Returns uninitialised memory for rows like those given; on CPUs memory that serves again. See `empty_buffer`."""
    shape = (count, *like.shape[1:])
    return like.new_empty(shape) if like.is_cuda else empty_buffer(*shape, dtype=like.dtype)


def by_kind(told: Tensor, heard: Tensor) -> list[list[list[list[int]]]]:
    """Returns counts on the host: told or heard, number, kind, rank; see `Ranks.ask`."""
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
    """A job of one process: nothing travels."""

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
        """Leaves the values as they are."""

    def all_gather(self, value: T) -> list[T]:
        """Returns the value alone."""
        return [value]

    def broadcast_object(self, value: T) -> T:
        """Returns the value."""
        return value

    def for_thread(self, timeout_seconds: float) -> Ranks:
        """Returns itself: there is nothing to share."""
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
    """Has the collectives of a process's communicators run one after another on its GPU, as NCCL asks for.

    Ranks whose GPUs began collectives of two communicators in different orders would wait for each other for ever.
    """

    def __init__(self) -> None:
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @contextlib.contextmanager
    def take(self, tensor: Tensor) -> Iterator[None]:
        """Runs a collective of a tensor; on the CPU, the order of the calls is the order."""
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
    """The ranks of a process group of torch: Gloo's on CPUs, NCCL's on GPUs.

    The group is not kept alive: Gloo's threads end with the last reference to their group. If a table or an optimizer
    of the user's kept one until Python itself ends, a thread that is still letting go of a tensor would abort the
    process.

    Args:
        group: the process group, of at least two ranks.
        turns: shared by the groups whose collectives go through one GPU; a new one if None.
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
            RuntimeError: it was destroyed.
        """
        group = self._reference()
        if group is None:
            raise RuntimeError("the process group of these tables was destroyed: they belong to a job that is over")
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
        count_sent(2 * (self.size - 1) * values.nbytes // self.size)  # in a ring
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
        """Returns the ranks of a second group of NCCL, made by the first call; itself without NCCL."""
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
        """Returns how long collectives of NCCL may take before torch calls them failed."""
        timeout: timedelta = self.group._get_backend(torch.device("cuda")).options._timeout
        return timeout

    def device_mesh(self, device_type: str) -> DeviceMesh | None:
        """See `Ranks`."""
        from torch.distributed.device_mesh import DeviceMesh

        return DeviceMesh.from_group(self.group, device_type)
