"""Named stages of a step, for profiles, for reports of where a rank is, and for the time per stage."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch.profiler import record_function

STAGE_PREFIX = "embedtrain: "
"""Prefix of the stages' names in profiles; stages may be nested."""


class _Here:
    """The current stage of this process. Global like the profiler, because a process does one step at a time."""

    def __init__(self) -> None:
        self.doing = "the start"
        self.open: list[str] = []
        self.failed_in = ""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.bytes_sent = 0


_here = _Here()


class _Stage:
    """Implements `stage`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._record: record_function | None = None

    def __enter__(self) -> None:
        _here.open.append(self._name)
        # A record takes several microseconds even without a profiler, and a step has a dozen stages.
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
    """Marks a stage of the step; costs a microsecond without a profiler."""
    return _Stage(name)


def begin(doing: str) -> None:
    """Sets what this process is doing, such as "step 12", for `whereabouts`."""
    _here.doing, _here.failed_in = doing, ""


def doing() -> str:
    """Returns the last argument of `begin`."""
    return _here.doing


def whereabouts() -> str:
    """Returns what this process is doing and in which stage, such as "step 12, forward > exchange".

    After an error it is the innermost stage that raised it.
    """
    stages = _here.failed_in or " > ".join(_here.open)
    return f"{_here.doing}, {stages}" if stages else _here.doing


def seconds_by_stage() -> dict[str, float]:
    """Returns the total host time per stage so far; nested stages count for each level."""
    return dict(_here.seconds)


def count_sent(num_bytes: int) -> None:
    """Adds to the number of bytes that this process sent to other ranks."""
    _here.bytes_sent += num_bytes


def bytes_sent() -> int:
    """Returns the number of bytes of rows, ids and gradients sent to other ranks so far."""
    return _here.bytes_sent
