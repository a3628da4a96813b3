"""Runs a function on N ranks that are threads of this process and take turns in a fixed order."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from embedtrain.distributed import stages
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")

_TIMEOUT_SECONDS = 60.0


class RankGone(ConnectionError):
    """Raised in a rank that waits in a collective if another rank has ended, or calls another collective."""


class _Turns:
    """Lets one rank run at a time, from one collective to the next, in rank order.

    Global state of a process is kept per rank: the state of torch's generator, and the current stage of the step.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._turn = 0
        self._posts: dict[int, tuple[str, Any]] = {}
        self._arrived: list[tuple[str, Any]] = []
        self._gone: dict[int, str] = {}
        self._generator_states = [torch.get_rng_state() for _ in range(size)]
        self._places = [type(stages._here)() for _ in range(size)]

    def begin(self, rank: int) -> None:
        with self._changed:
            self._await_turn(rank)

    def meet(self, rank: int, kind: str, value: Any) -> list[Any]:
        """Returns the values that the ranks pass to one collective, in rank order."""
        with self._changed:
            self._posts[rank] = (kind, value)
            if len(self._posts) == self.size:
                self._arrived, self._posts = [self._posts[number] for number in range(self.size)], {}
            self._pass_on(rank)
            self._await_turn(rank)
            if self._posts and rank in self._posts:  # all other ranks have ended
                raise RankGone(f"rank {rank} waits in {kind}, but " + ", ".join(self._gone.values()))
            kinds = [found for found, _ in self._arrived]
            if set(kinds) != {kind}:
                raise RankGone(f"the ranks call different collectives: {kinds}")
            return [brought for _, brought in self._arrived]

    def end(self, rank: int, how: str) -> None:
        with self._changed:
            self._gone[rank] = f"rank {rank} {how}"
            self._pass_on(rank)

    def _pass_on(self, rank: int) -> None:
        self._generator_states[rank] = torch.get_rng_state()
        others = [(rank + step) % self.size for step in range(1, self.size + 1)]
        self._turn = next((other for other in others if other not in self._gone), -1)
        self._changed.notify_all()

    def _await_turn(self, rank: int) -> None:
        if not self._changed.wait_for(lambda: self._turn == rank, _TIMEOUT_SECONDS):
            raise TimeoutError(f"rank {rank} waited {_TIMEOUT_SECONDS:g} s for its turn, which rank {self._turn} has")
        torch.set_rng_state(self._generator_states[rank])
        stages._here = self._places[rank]


class ThreadRanks(Ranks):
    """Implements the ranks of `run_threads`. Sent values are copied, so that ranks share no memory, like processes."""

    def __init__(self, rank: int, turns: _Turns) -> None:
        self.rank, self.size = rank, turns.size
        self._turns = turns

    def all_to_all(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """See `Ranks`."""
        stages.count_sent((len(rows) - send_counts[self.rank]) * rows.shape[1:].numel() * rows.element_size())
        parts = rows.detach().clone().split(list(send_counts))
        with stages.stage("exchange"):
            arrived = [sent[self.rank] for sent in self._turns.meet(self.rank, "all_to_all", parts)]
        assert [len(part) for part in arrived] == list(receive_counts), "ranks disagree on the split sizes"
        return torch.cat(arrived)

    def all_reduce(self, values: Tensor) -> Tensor:
        """See `Ranks`."""
        arrived = self._turns.meet(self.rank, "all_reduce", values.detach().clone())
        values.zero_()
        for part in arrived:
            values += part
        return values

    def broadcast(self, values: Tensor) -> None:
        """See `Ranks`."""
        values.copy_(self._turns.meet(self.rank, "broadcast", values.detach().clone())[0])

    def all_gather(self, value: T) -> list[T]:
        """See `Ranks`."""
        return [pickle.loads(sent) for sent in self._turns.meet(self.rank, "all_gather", pickle.dumps(value))]

    def broadcast_object(self, value: T) -> T:
        """See `Ranks`."""
        found: T = self.all_gather(value if self.rank == 0 else None)[0]  # type: ignore[assignment]
        return found

    def for_thread(self, timeout_seconds: float) -> Ranks:
        """Raises RuntimeError, because a thread that is not a rank has no turn."""
        raise RuntimeError("ranks that take turns have no background threads: run this test on processes")

    def device_mesh(self, device_type: str) -> DeviceMesh:
        """Raises RuntimeError, because torch's device meshes need process groups."""
        raise RuntimeError("ranks that are threads have no device mesh: run this test on processes")

    def beside(self) -> Ranks:
        """Returns these ranks."""
        return self


def thread_ranks(world_size: int) -> list[Ranks]:
    """Returns the ranks of one job, in order, for code that needs their number but does not communicate."""
    turns = _Turns(world_size)
    return [ThreadRanks(rank, turns) for rank in range(world_size)]


def outcomes_on_threads(world_size: int, function: Callable[..., T], *args: Any) -> list[T | BaseException]:
    """Calls `function(ranks, *args)` on each of `world_size` ranks; returns the result or the exception of each.

    Each rank is a thread, unless there is only one. A rank runs until its next collective, then the next rank runs.
    Arguments are shared, not copied.
    """
    if world_size == 1:
        try:
            return [function(ONE_PROCESS, *args)]
        except Exception as error:
            return [error]
    turns = _Turns(world_size)
    outcomes: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        how = "returned"
        turns.begin(rank)
        try:
            outcomes[rank] = function(ThreadRanks(rank, turns), *args)
        except BaseException as error:
            outcomes[rank], how = error, f"raised {type(error).__name__}: {error}"
        turns.end(rank, how)

    generator_state, place, num_threads = torch.get_rng_state(), stages._here, torch.get_num_threads()
    threads = [threading.Thread(target=run, args=(rank,), name=f"rank{rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_rng_state(generator_state)
    stages._here = place
    torch.set_num_threads(num_threads)
    return outcomes


def run_threads(world_size: int, function: Callable[..., T], *args: Any) -> list[T]:
    """Calls `function(ranks, *args)` on each of `world_size` ranks, like `outcomes_on_threads`; returns the results.

    Raises:
        Exception: the exception of a rank. If several ranks raised, `RankGone` is raised only if there is no other.
    """
    outcomes = outcomes_on_threads(world_size, function, *args)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, RankGone)):
        raise error
    return outcomes  # type: ignore[return-value]
