"""Finds the rank at fault when a collective fails, from the reports of the remaining ranks."""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from embedtrain.distributed.beacon import read_beacon
from embedtrain.distributed.launcher import GRACE_SECONDS
from embedtrain.distributed.runtime import Runtime
from embedtrain.distributed.stages import doing, whereabouts
from embedtrain.errors import DeviceTimeoutError


def is_of_the_group(error: BaseException) -> bool:
    """Returns whether an error means only that another rank did not take part in a collective."""
    return isinstance(error, dist.DistError | DeviceTimeoutError) or (
        isinstance(error, RuntimeError) and "gloo" in str(error)
    )


@dataclass(frozen=True)
class Report:
    """Holds the state of a rank at the failure.

    Attributes:
        host: the rank's host.
        place: what it was doing, and in which stage.
        text: its error; None if it does not respond.
        is_fault: whether the rank itself is at fault; False if it failed only because another rank was missing.
    """

    host: str
    place: str
    text: str | None = None
    is_fault: bool = False


@dataclass(frozen=True)
class Failure:
    """Holds the explanation of a failure.

    Attributes:
        text: the rank at fault and its error.
        is_spokesman: whether this rank prints the explanation.
    """

    text: str
    is_spokesman: bool


def explain_failure(error: Exception, runtime: Runtime, timeout_seconds: float) -> Failure:
    """Explains why this rank failed, using the reports of the other ranks.

    Not a collective: every rank that fails calls it.

    Args:
        error: the exception of this rank.
        runtime: the job's runtime.
        timeout_seconds: timeout of collectives.
    """
    own = Report(
        socket.gethostname(), whereabouts(), f"{type(error).__name__}: {error}", is_fault=not is_of_the_group(error)
    )
    reports = {runtime.rank: own}
    if runtime.store is not None:
        reports = _exchange(runtime, own)
    failed = [rank for rank, report in reports.items() if report.text is not None]
    return Failure(_blame(reports, runtime.world_size, doing(), timeout_seconds), runtime.rank == min(failed))


def is_shared(error: Exception, runtime: Runtime) -> bool:
    """Returns whether every rank failed by itself in the same activity, within a grace period.

    Then no rank waits for another, and all ranks can continue. Not a collective: every rank that fails calls it.

    Args:
        error: the exception of this rank.
        runtime: the job's runtime.
    """
    if is_of_the_group(error):
        return False
    if runtime.store is None:
        return True
    # A job may train several runs with the same steps; the counter tells them apart.
    number = runtime.store.add(f"shared/calls of {runtime.rank}", 1)
    store = dist.PrefixStore(f"shared/{number}/{doing()}", runtime.store)
    store.set(str(runtime.rank), "")
    try:
        store.wait([str(rank) for rank in range(runtime.world_size)], timedelta(seconds=GRACE_SECONDS))
    except RuntimeError:
        return False
    return True


def _blame(reports: Mapping[int, Report], world_size: int, step: str, timeout_seconds: float) -> str:
    culprits = {rank: report for rank, report in sorted(reports.items()) if report.is_fault}
    if culprits:
        return "; ".join(
            f"rank {rank} on {report.host} failed in {report.place}: {report.text}" for rank, report in culprits.items()
        )
    silent = [rank for rank in range(world_size) if rank not in reports or reports[rank].text is None]
    seen = f". Last seen: {_places(reports)}"
    if not silent:
        return f"in {step} a collective failed on every rank: {reports[0].text}{seen}"
    names = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {_ranges(silent)}"
    return (
        f"{names} did not take part in {step} and {'does' if len(silent) == 1 else 'do'} not answer: died, was "
        f"stopped, or hangs (collectives wait run.timeout_seconds={timeout_seconds:g}){seen}"
    )


def _places(reports: Mapping[int, Report]) -> str:
    """Returns where the ranks are, grouped by stage and host."""
    places: dict[tuple[str, str], list[int]] = {}
    for rank, report in sorted(reports.items()):
        places.setdefault((report.place, report.host), []).append(rank)
    return "; ".join(
        f"{'rank' if len(ranks) == 1 else 'ranks'} {_ranges(ranks)} on {host} in {place}"
        for (place, host), ranks in places.items()
    )


def _ranges(ranks: list[int]) -> str:
    """Returns ascending numbers as "0, 3-7"."""
    found = []
    for _, pairs in itertools.groupby(enumerate(ranks), key=lambda pair: pair[1] - pair[0]):
        run = [rank for _, rank in pairs]
        found.append(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)))
    return ", ".join(found)


def _exchange(runtime: Runtime, own: Report) -> dict[int, Report]:
    """Posts this rank's report to the job's store; returns the reports posted within the grace period."""
    reports = {runtime.rank: own}
    # If the store's host is unreachable, the store's own timeouts do not work, because cancelling waits for a response.
    # Then the thread is abandoned; the process is ending.
    thread = threading.Thread(target=_collect, args=(runtime, own, reports), daemon=True)
    thread.start()
    thread.join(2 * GRACE_SECONDS)
    return dict(reports)


def _collect(runtime: Runtime, own: Report, reports: dict[int, Report]) -> None:
    """Posts this rank's report and collects the others; for silent ranks, their last beacon."""
    assert runtime.store is not None
    store = dist.PrefixStore("failed", runtime.store)
    # A rank that failed by itself need not wait for ranks that fail because of it.
    others = [rank for rank in range(runtime.world_size) if rank != runtime.rank and not own.is_fault]
    try:
        store.set(str(runtime.rank), json.dumps(asdict(own)))
        give_up = time.monotonic() + GRACE_SECONDS
        for rank in others:
            if _has(store, rank, timedelta(seconds=max(0.05, give_up - time.monotonic()))):
                reports[rank] = Report(**json.loads(store.get(str(rank))))
            elif (seen := read_beacon(runtime.store, rank)) is not None:
                reports[rank] = Report(*seen)
    except (RuntimeError, ValueError):
        pass  # The store ended with the launcher: the reports so far are used.


def _has(store: dist.Store, rank: int, timeout: timedelta) -> bool:
    try:
        store.wait([str(rank)], timeout)
    except RuntimeError:
        return False
    return True
