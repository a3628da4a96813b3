"""The time of something that is run again and again, as it would take between other work."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPEATS = 7
_SWEPT_BYTES = 16 << 20
"""About what a step works on: more than a core keeps for itself."""


def median_seconds(run: Callable[[], object], device: torch.device | None = None, inner: int = 1) -> float:
    """Returns the median time of some runs, after two that map memory and fill caches.

    Before each, memory of the host is swept, for what a stage of a step finds in the caches is what others left.

    Args:
        run: what to time.
        device: that it works on; the CPU where None.
        inner: how often it is run for one time.
    """
    swept = torch.zeros(_SWEPT_BYTES, dtype=torch.uint8)
    found = []
    for _ in range(REPEATS + 2):
        swept += 1
        started_at = time.perf_counter()
        for _ in range(inner):
            run()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - started_at) / inner)
    return statistics.median(found[2:])
