"""Tracks the best measurement of a run, to save a checkpoint for it and to stop early if no better one follows."""

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
    """Configures how the best checkpoints are chosen and when training stops early.

    Attributes:
        metric: name of a metric in the records of the run.
        mode: whether the smallest or the largest values are best; see `mode_of_best`.
        num_kept: number of best checkpoints to keep; None for none.
        patience: number of consecutive measurements without an improvement after which training stops; None for no
            limit.
        min_delta: a value counts as an improvement only if it is better than the last improvement by more than this.
    """

    metric: str = Retention.best_metric
    mode: Literal["auto", "min", "max"] = Retention.best_mode
    num_kept: int | None = None
    patience: int | None = None
    min_delta: float = 0.0


def require_metric(metric: str, names: Collection[str]) -> None:
    """Checks that the records of a run contain a metric.

    Raises:
        UserError: the metric is not in `names`.
    """
    if metric not in names:
        raise UserError(
            f"checkpoint.best_metric={metric}: this run has no such metric; it has {', '.join(sorted(names))}"
        )


def check_metric(metric: str, task: Task) -> None:
    """Checks that the records of a run will contain a metric, as far as this is known before training.

    Raises:
        UserError: no record will contain the metric.
    """
    # Names with a slash belong to stages or tables and are not known in advance.
    if task.measures is not None and "/" not in metric:
        require_metric(metric, ("loss", "learning_rate", task.unit, f"{task.unit}_per_second", *task.measures))


class BestWatch:
    """Tracks the metric of a run. Its state is part of the run's counters, so a resumed run continues from it.

    Args:
        policy: the metric and its options.
        state: the run's counters, which hold the best value.
        ranks: the ranks of the run.
    """

    def __init__(self, policy: BestPolicy, state: TrainState, ranks: Ranks) -> None:
        self._policy = policy
        self._state = state
        self._ranks = ranks
        self._sign = 1 if mode_of_best(policy.metric, policy.mode) == "min" else -1
        self._is_on = policy.patience is not None or policy.num_kept is not None

    @property
    def is_over(self) -> bool:
        """Whether training must stop early, the same on every rank."""
        seen = self._seen()
        return self._policy.patience is not None and seen is not None and seen.num_since >= self._policy.patience

    def judge(self, record: Mapping[str, Any]) -> bool:
        """Processes a record and returns whether the current state is among the best checkpoints to keep.

        Collective: every rank. All ranks use the value of rank 0, because measured times differ between ranks.
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
        # In checkpoints of earlier versions `kept` is empty.
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
        """Logs why training stopped early."""
        seen = self._seen()
        assert seen is not None
        # The best value can be newer than the last improvement, if it was better by less than `min_delta`.
        enough = f" of more than {self._policy.min_delta:g}" if self._policy.min_delta else ""
        measurements = counted(seen.num_since, "measurement")
        _logger.info(
            f"stopped early at step {self._state.step:,}, after {measurements} of {seen.metric} without an "
            f"improvement{enough}; the best was {seen.value:.6g}, at step {seen.step:,}"
        )

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return self._policy.metric

    def _seen(self) -> BestSoFar | None:
        """Returns the best value so far; None before the first value, and after the metric setting has changed."""
        best = self._state.best
        return best if best is not None and best.metric == self._policy.metric else None
