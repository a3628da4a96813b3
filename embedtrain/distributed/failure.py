"""Which rank is to blame, told by the ranks that are left when a collective fails."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from embedtrain.distributed.runtime import Runtime

GRACE_SECONDS = 3.0
"""How long a rank whose collective failed waits to hear from the others: they fail at about the same time."""


def is_of_the_group(error: BaseException) -> bool:
    """Returns whether an error says no more than that another rank did not take part in a collective."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@dataclass(frozen=True)
class Failure:
    """What the ranks that are left know of a failure.

    Attributes:
        text: which rank is to blame, and for what.
        is_spokesman: whether this rank is the one to tell it.
    """

    text: str
    is_spokesman: bool


def explain_failure(error: Exception, runtime: Runtime, doing: str, timeout_seconds: float) -> Failure:
    """Finds out why this rank failed by asking the others; no collective, every rank that fails calls.

    Args:
        error: what this rank raised.
        runtime: of the job.
        doing: what was under way, such as "step 12".
        timeout_seconds: how long collectives wait.
    """
    text = f"{type(error).__name__}: {error}"
    own_fault = not is_of_the_group(error)
    reports = {runtime.rank: (own_fault, text)}
    if runtime.store is not None:
        reports = _exchange(runtime, reports[runtime.rank], must_wait=not own_fault)
    return Failure(_blame(reports, runtime.world_size, doing, timeout_seconds), runtime.rank == min(reports))


def _blame(reports: dict[int, tuple[bool, str]], world_size: int, doing: str, timeout_seconds: float) -> str:
    culprits = {rank: told for rank, (is_fault, told) in sorted(reports.items()) if is_fault}
    if culprits:
        return f"in {doing} " + "; ".join(f"rank {rank} failed: {told}" for rank, told in culprits.items())
    silent = [str(rank) for rank in range(world_size) if rank not in reports]
    if not silent:
        return f"in {doing} a collective failed on every rank: {reports[0][1]}"
    names = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {', '.join(silent)}"
    return (
        f"{names} did not take part in {doing} and {'does' if len(silent) == 1 else 'do'} not answer: died, was "
        f"stopped, or hangs (collectives wait run.timeout_seconds={timeout_seconds:g})"
    )


def _exchange(runtime: Runtime, report: tuple[bool, str], *, must_wait: bool) -> dict[int, tuple[bool, str]]:
    """Posts this rank's report in the job's store; returns those that came within the time of grace."""
    reports = {runtime.rank: report}
    # The store's own time-outs do not hold where the way to its host is cut: cancelling a wait waits for an answer.
    # The thread is left behind then; the process is about to end.
    thread = threading.Thread(target=_collect, args=(runtime, reports, must_wait), daemon=True)
    thread.start()
    thread.join(2 * GRACE_SECONDS)
    return dict(reports)


def _collect(runtime: Runtime, reports: dict[int, tuple[bool, str]], must_wait: bool) -> None:
    """Posts this rank's report and adds those of the others."""
    assert runtime.store is not None
    store = dist.PrefixStore("failed", runtime.store)
    try:
        store.set(str(runtime.rank), json.dumps(reports[runtime.rank]))
        give_up = time.monotonic() + (GRACE_SECONDS if must_wait else 0.0)
        for rank in range(runtime.world_size):
            left = timedelta(seconds=max(0.05, give_up - time.monotonic()))
            if rank != runtime.rank and must_wait and _has(store, rank, left):
                is_fault, text = json.loads(store.get(str(rank)))
                reports[rank] = (is_fault, text)
    except (RuntimeError, ValueError):
        pass  # the store ends with the launcher: what is known is told


def _has(store: dist.Store, rank: int, timeout: timedelta) -> bool:
    try:
        store.wait([str(rank)], timeout)
    except RuntimeError:
        return False
    return True
