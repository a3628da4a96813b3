"""Signals: asked to stop, a run finishes its step and saves."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = 75
"""Exit status of a run that was asked to stop and saved (EX_TEMPFAIL: run the same command again)."""

_PATIENCE_SECONDS = 2.0
"""torchrun passes a terminal's Ctrl-C on to ranks that have it already: that is not a second one."""


class Interrupt:
    """Notes SIGTERM, SIGINT and SIGUSR1 while it is entered.

    A second SIGINT, a while later, ends the process at once. SIGUSR1 is Slurm's warning before the time limit
    (`--signal=USR1@120`); torchrun passes it on with `--signals-to-handle SIGTERM,SIGINT,SIGUSR1`.
    """

    def __init__(self) -> None:
        self.is_asked = False
        self._first_seconds = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # Asked to stop, the run is saved and about to leave: one more SIGINT must not turn that into a failure.
            signal.signal(number, signal.SIG_IGN if self.is_asked and number == signal.SIGINT else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.is_asked:
            self.is_asked, self._first_seconds = True, now
        elif number == signal.SIGINT and now - self._first_seconds > _PATIENCE_SECONDS:
            os._exit(128 + signal.SIGINT)
