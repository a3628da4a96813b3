"""Handles the signals that stop a run: it finishes its step and saves."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = 75
"""Exit status of a run that stopped and saved after a signal (EX_TEMPFAIL: run the same command again)."""

_PATIENCE_SECONDS = 2.0
"""A SIGINT within this time does not count as a second one: torchrun forwards a terminal's Ctrl-C to ranks that the
terminal has signalled already."""


class Interrupt:
    """Records SIGTERM, SIGINT and SIGUSR1 in `is_asked` while entered, instead of ending the process.

    A second SIGINT more than two seconds after the first signal ends the process at once. Slurm sends SIGUSR1 before
    the time limit with `--signal=USR1@120`; torchrun forwards it with `--signals-to-handle SIGTERM,SIGINT,SIGUSR1`.
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
            # After a signal the run has saved and is about to exit; another SIGINT must not turn that into a failure.
            signal.signal(number, signal.SIG_IGN if self.is_asked and number == signal.SIGINT else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.is_asked:
            self.is_asked, self._first_seconds = True, now
        elif number == signal.SIGINT and now - self._first_seconds > _PATIENCE_SECONDS:
            os._exit(128 + signal.SIGINT)
