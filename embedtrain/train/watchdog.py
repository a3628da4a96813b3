"""The watchdog, which ends a rank that hangs and prints where it hangs."""

from __future__ import annotations

import faulthandler
import time
from types import TracebackType

_GRACE_SECONDS = 5.0
"""Seconds that are added to the timeout, so that the collectives of the other ranks time out first. Their error names
the rank that hangs."""

_ARMINGS = 20
"""The timer is restarted at most this many times per timeout, because a restart costs tens of microseconds."""


class Watchdog:
    """Prints the stacks of all threads and ends the process if `alive` is not called in time; active while entered.

    It does not need the interpreter lock, so it also catches native code that hangs.

    Args:
        timeout_seconds: longest time between two calls of `alive`; a few seconds are added.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._armed_at = 0.0

    def __enter__(self) -> Watchdog:
        """Starts the timer."""
        self.alive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancels the timer."""
        faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Reports that this rank makes progress, which restarts the timer."""
        now = time.monotonic()
        if self._armed_at == 0.0 or now - self._armed_at > self._timeout_seconds / _ARMINGS:
            faulthandler.dump_traceback_later(self._timeout_seconds + _GRACE_SECONDS, exit=True)
            self._armed_at = now
