"""A rank that hangs shows where, and ends."""

from __future__ import annotations

import faulthandler
import time
from types import TracebackType

_GRACE_SECONDS = 5.0
"""Ranks that wait for the one that hangs fail first, by their collective's time-out, and say which it is."""

_ARMINGS = 20
"""Arming costs tens of microseconds: it is done when a twentieth of the time has passed, not at every step."""


class Watchdog:
    """While entered, ends the process if `alive` is not called for a time, the stacks of all threads printed first.

    It works without the interpreter's lock, so that native code that hangs is caught too.

    Args:
        timeout_seconds: after how long, and a few seconds more.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._armed_at = 0.0

    def __enter__(self) -> Watchdog:
        """Begins to watch."""
        self.alive()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ceases to watch."""
        faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Says that this rank is getting on."""
        now = time.monotonic()
        if self._armed_at == 0.0 or now - self._armed_at > self._timeout_seconds / _ARMINGS:
            faulthandler.dump_traceback_later(self._timeout_seconds + _GRACE_SECONDS, exit=True)
            self._armed_at = now
