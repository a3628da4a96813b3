"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from embedtrain.distributed.collectives import all_reduce_sum
from embedtrain.distributed.runtime import rank_of
from embedtrain.errors import NonFiniteError
from embedtrain.metrics.sinks import MetricSink
from embedtrain.models.objective import Objective
from embedtrain.optim.sparse import SparseOptimizer
from embedtrain.stages import stage
from embedtrain.train.checkpoints import Checkpoints
from embedtrain.train.interrupt import Interrupt
from embedtrain.train.state import TrainState
from embedtrain.train.step import Model, train_step

_STEPS_BETWEEN_AGREEMENTS = 8
"""A signal is heard after at most so many steps; agreeing at each would cost a small collective a step."""


class Batches(Protocol):
    """Batches as functions of epoch and step."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch, the same on every rank."""

    def batch(self, epoch: int, step: int) -> Any:
        """Returns this rank's part of a step; it has `num_words`."""


class Trainer:
    """Trains a model to the end of its epochs, or until it is asked to stop.

    Args:
        model: takes a batch, returns its objective.
        optimizer: of the model's tables.
        batches: the data.
        state: where the run is; advanced in place.
        epochs: passes over the data.
        rate: learning rate by the share of the run that is done.
        checkpoints: when and how to save.
        group: the ranks of the run.
    """

    def __init__(
        self,
        model: Model,
        optimizer: SparseOptimizer,
        batches: Batches,
        state: TrainState,
        *,
        epochs: int,
        rate: Callable[[float], float],
        checkpoints: Checkpoints,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.state = state
        self.total_steps = epochs * batches.steps_per_epoch
        self._model = model
        self._optimizer = optimizer
        self._batches = batches
        self._rate = rate
        self._checkpoints = checkpoints
        self._group = group
        self._window = _Window()

    def run(
        self,
        sinks: Sequence[MetricSink],
        log_every_steps: int,
        *,
        before_save: Callable[[], None] | None = None,
        on_step: Sequence[Callable[[], None]] = (),
    ) -> bool:
        """Trains, logs and saves; returns whether the run is complete, not merely stopped and saved.

        Collective: every rank. Rank 0 alone passes sinks.

        Args:
            sinks: take a record every `log_every_steps` steps and at the end.
            log_every_steps: how often.
            before_save: collective; called on every rank before each save, which it can prevent by raising.
            on_step: each called after each step.
        """
        with Interrupt() as interrupt:
            while self.state.step < self.total_steps:
                self._train_once()
                for observe in on_step:
                    observe()
                step = self.state.step
                is_logged = step % log_every_steps == 0 or step == self.total_steps
                is_due = self._checkpoints.policy.is_due(step)
                if is_logged or is_due or step % _STEPS_BETWEEN_AGREEMENTS == 0:
                    is_stopped, is_overdue, has_failed = self._agree(interrupt.is_asked)
                    if has_failed:
                        self._checkpoints.settle()
                    if is_logged:
                        self._log(sinks)
                    if is_due or is_overdue or is_stopped:
                        self._save(before_save, is_last=is_stopped)
                    if is_stopped and step < self.total_steps:
                        return False
            self._save(before_save, is_last=True)
        return True

    def _save(self, before_save: Callable[[], None] | None, is_last: bool) -> None:
        if before_save is not None:
            before_save()
        self._checkpoints.save(is_last=is_last)

    def _train_once(self) -> None:
        try:
            self._step_once()
        except NonFiniteError:
            # Raised on every rank alike: the checkpoint under way is what the run goes back to.
            self._checkpoints.settle()
            raise

    def _step_once(self) -> None:
        with stage("sample"):
            batch = self._batches.batch(self.state.epoch, self.state.step_in_epoch)
        lr = self._rate(self.state.step / self.total_steps)
        objective = train_step(self._model, self._optimizer, batch, lr)
        self._window.add(objective, batch.num_words)
        self.state.advance(self._batches.steps_per_epoch)

    def _agree(self, is_asked_to_stop: bool) -> tuple[bool, bool, bool]:
        """Sums up what the ranks did since they last agreed; whether any wants to stop or save, or failed to save."""
        is_overdue = rank_of(self._group) == 0 and self._checkpoints.is_overdue()
        flags = [float(is_asked_to_stop), float(is_overdue), float(self._checkpoints.has_failed)]
        sums = all_reduce_sum(torch.tensor([*self._window.local, *flags], dtype=torch.float64), self._group).tolist()
        self.state.words += int(sums[2])
        self.state.seconds += self._window.close(sums[:3])
        return sums[3] > 0, sums[4] > 0, sums[5] > 0

    def _log(self, sinks: Sequence[MetricSink]) -> None:
        loss, words_per_second = self._window.report()
        record = {
            "step": self.state.step,
            "epoch": self.state.epoch + self.state.step_in_epoch / self._batches.steps_per_epoch,
            "loss": loss,
            "words_per_second": words_per_second,
            "learning_rate": self._rate((self.state.step - 1) / self.total_steps),
            "words": self.state.words,
        }
        if self._optimizer.num_skipped:
            record["skipped_steps"] = self._optimizer.num_skipped
        self._checkpoints.metrics = record
        for sink in sinks:
            sink.log(record)


class _Window:
    """Sums of loss, predictions and words: this rank's since the last agreement, all ranks' since the last log."""

    def __init__(self) -> None:
        self.local = [0.0, 0.0, 0.0]
        self._agreed = [0.0, 0.0, 0.0]
        self._agreed_at = self._reported_at = time.perf_counter()

    def add(self, objective: Objective, num_words: int) -> None:
        """Counts a step of this rank."""
        for i, value in enumerate((float(objective.total), objective.num_predictions, num_words)):
            self.local[i] += value

    def close(self, sums: list[float]) -> float:
        """Takes the sums over the ranks; returns the seconds since it last did."""
        self._agreed = [old + new for old, new in zip(self._agreed, sums, strict=True)]
        self.local = [0.0, 0.0, 0.0]
        now = time.perf_counter()
        seconds, self._agreed_at = now - self._agreed_at, now
        return seconds

    def report(self) -> tuple[float, float]:
        """Returns the mean loss and the words per second since the last report."""
        loss, predictions, words = self._agreed
        seconds = max(self._agreed_at - self._reported_at, 1e-9)
        self._agreed, self._reported_at = [0.0, 0.0, 0.0], self._agreed_at
        return loss / max(predictions, 1.0), words / seconds
