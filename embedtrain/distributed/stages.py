"""Names for the stages of a step: in a profile, for whoever asks where a rank is, and how long each takes in all."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch.profiler import record_function

STAGE_PREFIX = "embedtrain: "
"""Stages are recorded under names that begin so; stages may lie inside others."""


class _Here:
    """Where this process is. A process makes one step at a time, so it is at one place, like its profiler."""

    def __init__(self) -> None:
        self.doing = "the start"
        self.open: list[str] = []
        self.failed_in = ""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes_sent = 0


_here = _Here()


class _Stage:
    """As `stage` says."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._record: record_function | None = None

    def __enter__(self) -> None:
        _here.open.append(self._name)
        # A record takes several microseconds even where nobody reads it, and a step has a dozen stages.
        if torch.autograd._profiler_enabled():
            self._record = record_function(STAGE_PREFIX + self._name)
            self._record.__enter__()
        self._began_at = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _here.seconds[self._name] += time.perf_counter() - self._began_at
        if self._record is not None:
            self._record.__exit__(kind, error, trace)
        if error is not None and not _here.failed_in:
            _here.failed_in = " > ".join(_here.open)
        _here.open.pop()


def stage(name: str) -> AbstractContextManager[None]:
    """Marks a stage of the step; costs a microsecond where nobody profiles."""
    return _Stage(name)


def begin(doing: str) -> None:
    """Says what this process does from here on, such as "step 12", for `whereabouts`."""
    _here.doing, _here.failed_in = doing, ""


def doing() -> str:
    """Returns what `begin` said last."""
    return _here.doing


def whereabouts() -> str:
    """Returns what this process is doing and in which stage, such as "step 12, forward > exchange".

    After an error the stage is the innermost that it left.
    """
    stages = _here.failed_in or " > ".join(_here.open)
    return f"{_here.doing}, {stages}" if stages else _here.doing


def seconds_by_stage() -> dict[str, float]:
    """Returns how long this process has been in each stage so far, as the host sees it; stages lie inside others."""
    return dict(_here.seconds)


def count_sent(num_bytes: int) -> None:
    """Adds to the bytes that this process sent to other ranks."""
    _here.bytes_sent += num_bytes


def bytes_sent() -> int:
    """Returns the bytes of rows, ids and gradients that this process sent to other ranks so far."""
    return _here.bytes_sent
