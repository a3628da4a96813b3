"""Profiles the steps of a run: a trace for chrome://tracing and a table of the time per stage."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from torch.profiler import ProfilerActivity, profile

from embedtrain.distributed.stages import STAGE_PREFIX


class StepProfile:
    """Profiles some steps of a run after a warm-up; a context manager around the training loop.

    Args:
        write: called with the trace, JSON in Chrome's format, and the table of stages.
        warmup_steps: number of first steps to leave out, which map memory and fill caches.
        num_steps: largest number of steps to profile.

    Attributes:
        is_written: whether `write` was called. Without a step after the warm-up, it is not.
    """

    def __init__(self, write: Callable[[bytes, str], None], *, warmup_steps: int = 10, num_steps: int = 50) -> None:
        self._write = write
        self.warmup_steps = warmup_steps
        self._num_steps = num_steps
        self._steps = 0
        self._started_at = 0.0
        self._profile: profile | None = None
        self.is_written = False

    def __enter__(self) -> StepProfile:
        if self.warmup_steps == 0:
            self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def step(self) -> None:
        """Counts a completed step, and starts or ends the profile if it is due."""
        self._steps += 1
        if self._steps == self.warmup_steps:
            self._start()
        elif self._steps == self.warmup_steps + self._num_steps:
            self._finish()

    def _start(self) -> None:
        self._profile = profile(activities=[ProfilerActivity.CPU])
        self._profile.start()
        self._started_at = time.perf_counter()

    def _finish(self) -> None:
        if self._profile is None:
            return
        seconds = time.perf_counter() - self._started_at
        finished, self._profile = self._profile, None
        finished.stop()
        num_steps = self._steps - self.warmup_steps
        if num_steps == 0:
            return
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            finished.export_chrome_trace(str(path))
            self._write(path.read_bytes(), stage_table(finished, num_steps, seconds))
        self.is_written = True


def stage_table(finished: profile, num_steps: int, seconds: float) -> str:
    """Returns a table of the time per stage, longest first, below a line for the whole step."""
    lines = [f"{num_steps} steps, {seconds / num_steps * 1e3:.3f} ms per step", "stage              ms/step   share"]
    totals = {
        event.key.removeprefix(STAGE_PREFIX): event.cpu_time_total / 1e6
        for event in finished.key_averages()
        if event.key.startswith(STAGE_PREFIX)
    }
    for name, total in sorted(totals.items(), key=lambda item: -item[1]):
        lines.append(f"{name:<16} {total / num_steps * 1e3:9.3f}  {total / seconds:6.1%}")
    return "\n".join(lines)
