"""The best measurement of a run so far: when a checkpoint is saved for it, and when training ends without a better."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from embedtrain.checkpoint.retention import Retention, mode_of_best
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError, counted
from embedtrain.train.state import BestSoFar, TrainState
from embedtrain.train.task import Task

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestPolicy:
    """By which metric the best checkpoint is chosen, and when training stops early.

    Attributes:
        metric: a name among the records of the run.
        mode: whether the smallest or the largest values are the best; see `mode_of_best`.
        num_kept: how many of the best checkpoints are kept; None for none.
        patience: after how many measurements in a row without an improvement training ends; None for never.
        min_delta: by how much a value must be better than the one before to be an improvement.
    """

    metric: str = Retention.best_metric
    mode: Literal["auto", "min", "max"] = Retention.best_mode
    num_kept: int | None = None
    patience: int | None = None
    min_delta: float = 0.0


def require_metric(metric: str, names: Collection[str]) -> None:
    """Refuses a metric that the records of a run do not have.

    Raises:
        UserError: it is not among the names.
    """
    if metric not in names:
        raise UserError(
            f"checkpoint.best_metric={metric}: this run has no such metric; it has {', '.join(sorted(names))}"
        )


def check_metric(metric: str, task: Task) -> None:
    """Refuses a metric that the records of a run will not have, as far as that is known before the first ones.

    Raises:
        UserError: no record will have it.
    """
    # A name with a slash is that of a stage, a table or the like.
    if task.measures is not None and "/" not in metric:
        require_metric(metric, ("loss", "learning_rate", task.unit, f"{task.unit}_per_second", *task.measures))


class BestWatch:
    """Follows the metric of a run, in the run's own counters, so that a resumed run goes on where it was.

    Args:
        policy: what to follow.
        state: of the run.
        ranks: those of the run.
    """

    def __init__(self, policy: BestPolicy, state: TrainState, ranks: Ranks) -> None:
        self._policy = policy
        self._state = state
        self._ranks = ranks
        self._sign = 1 if mode_of_best(policy.metric, policy.mode) == "min" else -1
        self._is_on = policy.patience is not None or policy.num_kept is not None

    @property
    def is_over(self) -> bool:
        """Whether the patience is at its end; alike on every rank."""
        seen = self._seen()
        return self._policy.patience is not None and seen is not None and seen.num_since >= self._policy.patience

    def judge(self, record: Mapping[str, Any]) -> bool:
        """Takes a record; returns whether a checkpoint of now would be kept for it.

        Collective: every rank. Rank 0's value counts, since ranks measure times by clocks of their own.
        """
        if not self._is_on or self._policy.metric not in record:
            return False
        value = self._ranks.run_on_first(lambda: float(record[self._policy.metric]))
        seen, score = self._seen(), self._sign * value
        if not math.isfinite(value):
            if seen is not None:
                seen.num_since += 1
            return False
        num_kept = self._policy.num_kept or 1
        # Checkpoints of earlier versions hold no list.
        best = () if seen is None else seen.kept or (seen.value,)
        is_kept = len(best) < num_kept or score < self._sign * best[num_kept - 1]
        kept = tuple(sorted((*best, value), key=lambda each: self._sign * each)[:num_kept])
        if seen is None or score < self._sign * seen.mark - self._policy.min_delta:
            self._state.best = BestSoFar(self._policy.metric, value, self._state.step, value, kept=kept)
        else:
            seen.num_since += 1
            seen.kept = kept
            if score < self._sign * seen.value:
                seen.value, seen.step = value, self._state.step
        return self._policy.num_kept is not None and is_kept

    def explain(self) -> None:
        """Logs why training has ended early."""
        seen = self._seen()
        assert seen is not None
        # A best that is too little better than the one before is no improvement: the two have steps of their own.
        enough = f" of more than {self._policy.min_delta:g}" if self._policy.min_delta else ""
        measurements = counted(seen.num_since, "measurement")
        _logger.info(
            f"stopped early at step {self._state.step:,}, after {measurements} of {seen.metric} without an "
            f"improvement{enough}; the best was {seen.value:.6g}, at step {seen.step:,}"
        )

    @property
    def metric(self) -> str:
        """The metric's name."""
        return self._policy.metric

    def _seen(self) -> BestSoFar | None:
        """Returns the best so far; None before the first value, and after the metric was changed."""
        best = self._state.best
        return best if best is not None and best.metric == self._policy.metric else None
