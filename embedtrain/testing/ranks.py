"""Runs a function on N ranks, each a process on this machine, and collects their results or exceptions."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from embedtrain.distributed.runtime import job_ranks

T = TypeVar("T")

# Imported once by the fork server instead of by each of its processes; names that cannot be imported are skipped.
# torch imports its compiler when the first optimizer is made, which takes longer than most tests.
_PRELOADED_MODULES = [
    "torch",
    "torch._dynamo",
    "torch.distributed",
    "torch.distributed.nn",
    "torch.distributed.run",
    "pyarrow.parquet",
    "pytest",
    "torch.distributed.tensor",
    "torch.utils.tensorboard.summary",
    "embedtrain",
    "embedtrain.cli",
    # The command line imports a command only to run it, and the registry a recipe only to use it.
    "embedtrain.commands.job",
    "embedtrain.commands.dry_run",
    "embedtrain.commands.train",
    "embedtrain.train.run",
    "embedtrain.commands.evaluate",
    "embedtrain.commands.export",
    "embedtrain.commands.predict",
    "embedtrain.recipes.loading",
    "embedtrain.recipes.word2vec.recipe",
    "embedtrain.recipes.retrieval.recipe",
    "embedtrain.recipes.ranking.recipe",
    "embedtrain.testing.ranks",
]

# Time for the other ranks to report after the first failure.
_GRACE_SECONDS = 3.0

# Time between the deadline, when a rank writes its stacks, and reading the stacks and killing the rank.
_STACK_DUMP_SECONDS = 0.5


class RankError(RuntimeError):
    """Raised if at least one rank raised an exception, died or did not finish in time.

    Attributes:
        rank: the rank that failed first.
        errors: type name and message of the exception, by rank.
        died: cause of death by rank, such as "SIGKILL", of ranks that neither returned nor raised an exception.
        unfinished: ranks that were killed because they were still running.
    """

    def __init__(
        self,
        text: str,
        rank: int,
        errors: Mapping[int, tuple[str, str]],
        died: Mapping[int, str],
        unfinished: list[int],
    ) -> None:
        super().__init__(text)
        self.rank = rank
        self.errors = dict(errors)
        self.died = dict(died)
        self.unfinished = unfinished


@dataclass(frozen=True)
class _Returned:
    value: Any


@dataclass(frozen=True)
class _Raised:
    type_name: str
    message: str
    stack: str

    def __str__(self) -> str:
        return f"raised {self.type_name}: {self.message}"


@dataclass(frozen=True)
class _Died:
    cause: str

    def __str__(self) -> str:
        return f"died: {self.cause}"


@dataclass(frozen=True)
class _Hung:
    stack: str

    def __str__(self) -> str:
        return "did not finish"


_Outcome = _Returned | _Raised | _Died | _Hung


@dataclass(frozen=True)
class _Rank:
    process: BaseProcess
    connection: Connection
    stack_path: Path

    def is_ready(self, ready: list[Any]) -> bool:
        return self.connection in ready or self.process.sentinel in ready

    def outcome(self) -> _Outcome:
        """Returns the report of a ready rank, or its cause of death."""
        try:
            outcome: _Outcome = pickle.loads(self.connection.recv_bytes())
        except (EOFError, ConnectionError):
            self.process.join()
            return _Died(_cause_of_death(self.process.exitcode))
        return outcome


def fork_server() -> ForkServerContext:
    """Returns the context of the fork server, which starts on first use and imports torch and embedtrain."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED_MODULES)
    return context


def run_ranks(world_size: int, function: Callable[..., T], *args: Any, timeout_seconds: float = 60) -> list[T]:
    """Calls `function(ranks, *args)` on `world_size` ranks and returns their results in rank order.

    Every rank is a separate process with one torch thread and the environment variables of this process. Arguments and
    results are copied by pickle, including tensors. A rank that has ended stays connected until all ranks have
    reported, so that no rank fails only because another rank was faster.

    Args:
        world_size: number of ranks.
        function: importable by name (not a closure or lambda). Its first argument is the `Ranks` of a Gloo process
            group, which use shared memory unless the environment disables it.
        args: further arguments of the function.
        timeout_seconds: time limit for everything, including the start of the processes.

    Raises:
        RankError: a rank raised an exception, died or hung. The others get a few seconds to report and are killed.
    """
    payload = pickle.dumps((function, args))
    deadline = time.monotonic() + timeout_seconds
    with tempfile.TemporaryDirectory(prefix="embedtrain-ranks-") as folder:
        ranks: list[_Rank] = []
        try:
            for rank in range(world_size):
                ranks.append(_start(rank, world_size, payload, Path(folder), deadline))
            outcomes = _collect(ranks, deadline)
            results = {rank: end.value for rank, end in outcomes.items() if isinstance(end, _Returned)}
            if len(results) == world_size:
                _dismiss(ranks, outcomes, timeout_seconds)
            if not all(isinstance(outcome, _Returned) for outcome in outcomes.values()):
                raise _rank_error(outcomes, timeout_seconds)
            return [results[rank] for rank in range(world_size)]
        finally:
            for started in ranks:
                started.connection.close()
                started.process.kill()
                started.process.join()
                started.process.close()


def _start(rank: int, world_size: int, payload: bytes, folder: Path, deadline: float) -> _Rank:
    context = fork_server()
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_rank_main,
        args=(theirs, rank, world_size, payload, folder, deadline, dict(os.environ)),
        name=f"rank{rank}",
        daemon=False,
    )
    process.start()
    theirs.close()
    return _Rank(process, ours, _stack_path(folder, rank))


def _collect(ranks: list[_Rank], deadline: float) -> dict[int, _Outcome]:
    """Waits for all ranks, or for a short time after the first failure; keys are in the order of arrival."""
    outcomes: dict[int, _Outcome] = {}
    pending = dict(enumerate(ranks))
    limit = deadline + _STACK_DUMP_SECONDS
    while pending and (left := limit - time.monotonic()) > 0:
        connections = [rank.connection for rank in pending.values()]
        sentinels = [rank.process.sentinel for rank in pending.values()]
        ready = wait([*connections, *sentinels], timeout=left)
        for number in [number for number, rank in pending.items() if rank.is_ready(ready)]:
            outcomes[number] = pending.pop(number).outcome()
            if not isinstance(outcomes[number], _Returned):
                limit = min(limit, time.monotonic() + _GRACE_SECONDS)
    for number, rank in pending.items():
        outcomes[number] = _Hung(rank.stack_path.read_text() if rank.stack_path.exists() else "")
    return outcomes


def _rank_error(outcomes: dict[int, _Outcome], timeout_seconds: float) -> RankError:
    failures = {rank: outcome for rank, outcome in outcomes.items() if not isinstance(outcome, _Returned)}
    raised = {rank: outcome for rank, outcome in failures.items() if isinstance(outcome, _Raised)}
    hung = {rank: outcome for rank, outcome in failures.items() if isinstance(outcome, _Hung)}
    first_rank, first = next(iter(failures.items()))

    lines = [f"rank {rank} of {len(outcomes)} {outcome}" for rank, outcome in failures.items()]
    if isinstance(first, _Hung):
        lines.insert(0, f"no end after {timeout_seconds:g} s")
        stacks = {rank: outcome.stack for rank, outcome in hung.items()}
    else:
        stacks = {rank: outcome.stack for rank, outcome in raised.items()}
    lines += [f"\n--- rank {rank} ---\n{stack.rstrip()}" for rank, stack in stacks.items() if stack]
    return RankError(
        "\n".join(lines),
        first_rank,
        errors={rank: (outcome.type_name, outcome.message) for rank, outcome in raised.items()},
        died={rank: outcome.cause for rank, outcome in failures.items() if isinstance(outcome, _Died)},
        unfinished=sorted(hung),
    )


def _dismiss(ranks: list[_Rank], outcomes: dict[int, _Outcome], timeout_seconds: float) -> None:
    """Waits for ranks that have all returned to exit; a rank that fails to exit gets a new outcome."""
    for rank in ranks:
        rank.connection.close()
    for number, rank in enumerate(ranks):
        rank.process.join(timeout_seconds)
        code = rank.process.exitcode
        if code is None:
            outcomes[number] = _Hung("")
        elif code != 0:
            outcomes[number] = _Died(f"{_cause_of_death(code)} after it returned")


def _cause_of_death(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return signal.Signals(-exit_code).name
    return f"exit status {exit_code}"


def _stack_path(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.stack"


def _rank_main(
    connection: Connection,
    rank: int,
    world_size: int,
    payload: bytes,
    folder: Path,
    deadline: float,
    environment: dict[str, str],
) -> None:
    """Runs one rank in its process, from joining the group to reporting the outcome."""
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(_stack_path(folder, rank), "w") as stack_file:
        seconds_left = max(0.1, deadline - time.monotonic())
        faulthandler.dump_traceback_later(seconds_left, file=stack_file)
        try:
            if world_size > 1:
                _init_group(rank, world_size, folder, seconds_left)
            function, args = pickle.loads(payload)
            report = pickle.dumps(_Returned(function(job_ranks(), *args)))
        except BaseException as error:
            report = pickle.dumps(_Raised(type(error).__name__, str(error), traceback.format_exc()))
        connection.send_bytes(report)
        with contextlib.suppress(EOFError, ConnectionError):
            connection.recv_bytes()  # Waits until the parent closes its side; nothing is sent.
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()


def _init_group(rank: int, world_size: int, folder: Path, seconds_left: float) -> None:
    # Longer than the parent waits, so that the parent reports a hang, with the stacks of all ranks.
    timeout = timedelta(seconds=2 * seconds_left)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
