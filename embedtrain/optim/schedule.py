"""Learning-rate schedules: a factor of the base rate as a function of the run's progress."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[float, float], float]
"""Takes the fraction of the run that is done and the fraction that is warm-up, both in [0, 1]. Returns the factor of
the base learning rate after the warm-up."""


def constant(done: float, warmup: float) -> float:
    """Keeps the base rate."""
    return 1.0


def linear(done: float, warmup: float) -> float:
    """Falls linearly to zero, as in word2vec."""
    return 1.0 - _since(done, warmup)


def cosine(done: float, warmup: float) -> float:
    """Falls along half a cosine to zero."""
    return 0.5 * (1.0 + math.cos(math.pi * _since(done, warmup)))


def inverse_sqrt(done: float, warmup: float) -> float:
    """Falls with the inverse square root of the steps, from the base rate at the end of the warm-up.

    Source: Vaswani et al. 2017, "Attention is all you need", section 5.3.
    """
    return math.sqrt(warmup / done)


SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "inverse_sqrt": inverse_sqrt,
}


def schedule_factor(name: str, done: float, min_factor: float = 0.0, warmup: float = 0.0) -> float:
    """Returns the learning-rate factor of a schedule.

    Args:
        name: a key of `SCHEDULES`.
        done: fraction of the run that is done; clamped to [0, 1].
        min_factor: smallest factor that is returned.
        warmup: fraction of the run in which the rate first rises linearly to the base rate.

    Raises:
        ValueError: there is no schedule of this name, or the warm-up is out of range.
    """
    if name not in SCHEDULES:
        raise ValueError(f"there is no schedule {name!r}; there are {', '.join(sorted(SCHEDULES))}")
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a share in [0, 1), got {warmup}")
    if name == "inverse_sqrt" and warmup == 0:
        raise ValueError("the schedule inverse_sqrt falls from the end of its warm-up: warmup must be positive")
    done = min(max(done, 0.0), 1.0)
    factor = done / warmup if done < warmup else SCHEDULES[name](done, warmup)
    return max(factor, min_factor)


def _since(done: float, warmup: float) -> float:
    return (done - warmup) / (1.0 - warmup)
