"""Learning-rate schedules: factors of the base rate by the share of the run that is done."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float], float]
"""Takes the share of the run that is done, 0 to 1; returns the factor of the base learning rate."""


def constant(done: float) -> float:
    """The base rate throughout."""
    return 1.0


def linear(done: float) -> float:
    """Falls in a straight line to zero, as word2vec's."""
    return 1.0 - done


def cosine(done: float) -> float:
    """Falls along half a cosine to zero."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


SCHEDULES: dict[str, Schedule] = {"constant": constant, "linear": linear, "cosine": cosine}


def schedule_factor(name: str, done: float, min_factor: float) -> float:
    """Returns a schedule's factor at `done` in [0, 1], not below `min_factor`.

    Raises:
        ValueError: there is no schedule of this name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"there is no schedule {name!r}; there are {', '.join(sorted(SCHEDULES))}")
    return max(SCHEDULES[name](min(max(done, 0.0), 1.0)), min_factor)
