"""The training loop."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.stages import begin, stage
from embedtrain.errors import CorruptCheckpointError, NonFiniteError, UserError
from embedtrain.metrics.sinks import MetricSink
from embedtrain.ops._backend.transfer import to_host
from embedtrain.train.ahead import BatchesAhead, Prepared
from embedtrain.train.best import BestWatch, require_metric
from embedtrain.train.calendar import Calendar
from embedtrain.train.checkpoints import Checkpoints
from embedtrain.train.interrupt import Interrupt
from embedtrain.train.state import LogWindow, TrainState
from embedtrain.train.step import DEFAULT_OPTIONS, StepOptions, micro_batches, train_step
from embedtrain.train.step_statistics import StepStatistics
from embedtrain.train.task import Objective, StreamedBatches, Task

T = TypeVar("T")

_logger = logging.getLogger(__name__)

_STEPS_BETWEEN_AGREEMENTS = 8
"""Largest number of steps until the ranks agree on signals. Agreeing at every step would cost a collective per step."""


class Trainer:
    """Trains a model to the end of its epochs or of a stream, or until it is asked to stop.

    The base learning rates are those of the task's optimizers at construction.

    Args:
        task: the model, its optimizers and data.
        state: the counters of the run; updated in place.
        epochs: number of epochs; ignored for a stream, which is read once.
        schedule: returns the factor of all base learning rates for the fraction of the run that is done.
        checkpoints: saves the run.
        ranks: the ranks of the run.
        options: options of the steps.
        is_shared: returns whether every rank failed by itself, as this one did; not a collective. With None, a failed
            evaluation ends the run unless there is only one rank.
    """

    def __init__(
        self,
        task: Task,
        state: TrainState,
        *,
        epochs: int,
        schedule: Callable[[float], float],
        checkpoints: Checkpoints,
        ranks: Ranks,
        options: StepOptions = DEFAULT_OPTIONS,
        is_shared: Callable[[Exception], bool] | None = None,
    ) -> None:
        self.state = state
        self._calendar = None if isinstance(task.batches, StreamedBatches) else Calendar(task.batches)
        self.total_steps = None if self._calendar is None else self._calendar.first_step_of(epochs)
        self._epochs = epochs
        self._task = task
        self._stream = task.batches if isinstance(task.batches, StreamedBatches) else None
        self._ahead = (
            None if isinstance(task.batches, StreamedBatches) else BatchesAhead(task, options.accumulate_steps)
        )
        # If the dense optimizer cannot skip a step on the device, the host must know at once if gradients are finite.
        is_known_to_device = task.dense is None or task.dense.takes_found_inf
        task.optimizer.looks_later = task.tables.device.type == "cuda" and is_known_to_device
        self._rates = [float(settings["lr"]) for settings in task.optimizer.param_groups]
        self._schedule = schedule
        self._checkpoints = checkpoints
        self._options = options
        self._ranks = ranks
        self._is_shared = is_shared or (lambda error: ranks.size == 1)
        self._best = BestWatch(checkpoints.policy.best, state, ranks)
        self._names: frozenset[str] = frozenset()
        self._kinds: set[bool] = set()  # kinds of records so far: True for training, False for evaluation
        self._check_counters()
        # Checkpoints of earlier versions hold no window; then the next record starts from zero.
        window = state.window or LogWindow(state.step, state.step)
        self._window = _Window(window.sums, window.seconds)
        self._statistics = StepStatistics(task.tables, ranks)
        self._is_drained = False
        self._logged_step, self._measured_step = window.logged_step, window.measured_step

    def run(
        self,
        sinks: Sequence[MetricSink],
        log_every_steps: int,
        *,
        before_save: Callable[[], None] | None = None,
        alive: Callable[[], None] | None = None,
        on_step: Callable[[], None] | None = None,
        is_asked: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Trains, logs and saves; returns True if the run is complete, False if it was stopped and saved.

        Collective: every rank.

        Args:
            sinks: receive the records; empty on all ranks but rank 0.
            log_every_steps: steps between two training records; there is also one at the end.
            before_save: collective; called on every rank before each save. It prevents the save by raising an error.
            alive: heartbeat function; called after each step and now and then during an evaluation.
            on_step: called after each step.
            is_asked: returns whether this rank must stop and save for a reason other than a signal.
        """
        with Interrupt() as interrupt:
            while not self.is_over():
                has_trained = self._or_settle(self._train_once)
                for observe in (alive, on_step if has_trained else None):
                    if observe is not None:
                        observe()
                step = self.state.step
                is_logged = has_trained and (step % log_every_steps == 0 or step == self.total_steps)
                is_due = has_trained and self._checkpoints.policy.is_due(step)
                is_measured = has_trained and self._is_measured(step)
                # The ranks also agree whenever a stream brings no batch: they are idle then.
                if is_logged or is_due or is_measured or not has_trained or step % _STEPS_BETWEEN_AGREEMENTS == 0:
                    self._or_settle(self._task.optimizer.settle)
                    is_stopped, is_overdue, has_failed = self._agree(interrupt.is_asked or is_asked())
                    if has_failed:
                        self._checkpoints.settle()
                    if is_logged:
                        self._log(sinks)
                    if is_measured:
                        is_due |= self._measure(sinks, alive)
                    if self._best.is_over:
                        self._finish_records(sinks, alive)
                    if is_due or is_overdue or is_stopped:
                        self._save(before_save, is_last=is_stopped)
                    if is_stopped and not self.is_over():
                        return False
            if self._is_drained:
                self._finish_records(sinks, alive)
            if self._best.is_over and self._ranks.rank == 0:
                self._best.explain()
            self._save(before_save, is_last=True)
        return True

    def is_over(self) -> bool:
        """Returns whether training has reached the last epoch's or the stream's end, or has stopped early."""
        is_at_end = self.total_steps is not None and self.state.step >= self.total_steps
        return self._is_drained or is_at_end or self._best.is_over

    def _finish_records(self, sinks: Sequence[MetricSink], alive: Callable[[], None] | None) -> None:
        """Logs and evaluates the last step, if it was not known to be the last. Collective: every rank."""
        if self.state.step > self._logged_step:
            self._log(sinks)
        if self.state.step > self._measured_step and self._task.evaluation is not None:
            self._measure(sinks, alive)

    def _save(self, before_save: Callable[[], None] | None, is_last: bool) -> None:
        if before_save is not None:
            before_save()
        sums, seconds = self._window.open_sums()
        self.state.window = LogWindow(self._logged_step, self._measured_step, sums, seconds)
        with stage("save"):
            self._checkpoints.save(is_last=is_last)

    def _check_counters(self) -> None:
        """Raises CorruptCheckpointError if the counters contradict the data; a run past its end would never stop."""
        state = self.state
        if self._calendar is None:
            return
        if self._calendar.place_of(state.step) != (state.epoch, state.step_in_epoch):
            raise CorruptCheckpointError(
                f"the checkpoint's counters are step {state.step}, {state.epoch} epochs and {state.step_in_epoch} "
                f"steps, which do not add up with {self._calendar.steps_of(state.epoch)} steps per epoch"
            )

    def _or_settle(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except NonFiniteError:
            # All ranks raise this error. Finish the current background save, because the run will resume from it.
            self._checkpoints.settle()
            raise

    def _train_once(self) -> bool:
        """Trains one step; returns False if a stream has not delivered the batch yet or has ended."""
        begin(f"step {self.state.step + 1}")
        if self._stream is not None:
            with stage("sample"):
                batch, position, self._is_drained = self._stream.next_batch(self.state.stream)
            if batch is None:
                return False
            self._statistics.begin_step(self.state.step)
            first, *further = micro_batches(batch, self._options.accumulate_steps)
            self._train_on(Prepared(first, batch.num_examples, further))
            self.state.advance_stream(position)
        else:
            assert self._ahead is not None
            assert self._calendar is not None
            self._statistics.begin_step(self.state.step)
            self._train_on(self._ahead.take(self.state.epoch, self.state.step_in_epoch))
            self.state.advance(self._calendar.steps_of(self.state.epoch))
        return True

    def _train_on(self, prepared: Prepared) -> None:
        task, options = self._task, self._options
        if self.state.step == options.reset_state_from_step:
            task.optimizer.reset_state()
        factor = self._factor_at(self.state.step)
        for settings, rate in zip(task.optimizer.param_groups, self._rates, strict=True):
            settings["lr"] = rate * factor
        batch, further, meanwhile = prepared.batch, prepared.further, self._prepare_next
        objective = train_step(task.model, task.optimizer, batch, task.dense, factor, meanwhile, further, options)
        self._window.add(objective, prepared.num_examples)

    def _factor_at(self, step: int) -> float:
        """Returns the schedule's factor at a step; a stream has no known length, so it keeps the initial factor."""
        return self._schedule(0.0 if self._calendar is None else self._calendar.share_done(step, self._epochs))

    def _prepare_next(self) -> None:
        if self._ahead is None or self._calendar is None or self.total_steps is None:
            return
        step = self.state.step + 1
        place = self._calendar.place_of(step)
        self._ahead.prepare_next(*place, num_left=self.total_steps - step, context=self._statistics.ahead)

    def _is_measured(self, step: int) -> bool:
        evaluation = self._task.evaluation
        if evaluation is None:
            return False
        is_at_end = self._calendar is not None and self.state.step_in_epoch == 0
        return evaluation.is_due(step, self.state.epoch if is_at_end else None, self.total_steps)

    def _agree(self, is_asked_to_stop: bool) -> tuple[bool, bool, bool]:
        """Sums the ranks' counts since the last agreement. Collective: every rank.

        Returns:
            is_stopped: whether any rank is asked to stop.
            is_overdue: whether rank 0's clock says that a checkpoint is due.
            has_failed: whether any rank knows of a failed background save.
        """
        is_overdue = self._ranks.rank == 0 and self._checkpoints.is_overdue()
        flags = [float(is_asked_to_stop), float(is_overdue), float(self._checkpoints.has_failed)]
        local = torch.cat([torch.tensor(flags, dtype=torch.float64), self._window.local])
        with stage("agree"):
            sums = self._ranks.all_reduce(local)
        self.state.examples += int(sums[len(flags) + _EXAMPLES])
        self.state.seconds += self._window.close(sums[len(flags) :])
        is_stopped, is_overdue, has_failed = (sums[: len(flags)] > 0).tolist()
        return is_stopped, is_overdue, has_failed

    def _log(self, sinks: Sequence[MetricSink]) -> None:
        """Logs a record of the steps since the last one. Collective: every rank."""
        unit = self._task.unit
        sums, seconds = self._window.report()
        factor = self._factor_at(self.state.step - 1)
        record = {
            **self._when(),
            "loss": float(sums[_LOSS]) / max(float(sums[_PREDICTIONS]), 1.0),
            f"{unit}_per_second": float(sums[_EXAMPLES]) / seconds,
            "learning_rate": self._rates[0] * factor,
            unit: self.state.examples,
        }
        for settings, rate in zip(self._task.optimizer.param_groups, self._rates, strict=True):
            if rate != self._rates[0]:
                record.update({f"learning_rate/{table}": rate * factor for table in settings["tables"]})
        if self._task.summarize is not None:
            record.update(self._task.summarize(sums[_EXAMPLES + 1 :]))
        if self._task.optimizer.num_skipped:
            record["skipped_steps"] = self._task.optimizer.num_skipped
        record.update(self._statistics.measure(self.state.step - self._logged_step))
        self._take(record, sinks)
        self._logged_step = self.state.step

    def _measure(self, sinks: Sequence[MetricSink], alive: Callable[[], None] | None) -> bool:
        """Evaluates on held-out data; returns whether to save now.

        The run is saved if the result is among the best to keep. It is also saved if the evaluation failed, so that no
        training is lost.

        Collective: every rank.
        """
        assert self._task.evaluation is not None
        error: Exception | None = None
        with stage("evaluate"):
            try:
                measures = self._task.evaluation.measure(alive or (lambda: None))
            except Exception as caught:
                if not self._is_shared(caught):
                    raise
                error = caught
        is_kept = False
        if error is None:
            is_kept = self._take({**self._when(), **measures}, sinks)
        elif self._ranks.rank == 0:
            _logger.warning(
                f"the evaluation at step {self.state.step:,} failed, and training continues without its measures: "
                f"{error if isinstance(error, UserError) else f'{type(error).__name__}: {error}'}"
            )
        self._measured_step = self.state.step
        self._window.leave_out_time()
        return is_kept or error is not None

    def _take(self, record: Mapping[str, float | int | str], sinks: Sequence[MetricSink]) -> bool:
        """Passes a record to the sinks; returns whether it is among the best to keep. Collective: every rank."""
        self._names |= record.keys()
        self._kinds.add("loss" in record)
        self._checkpoints.take_metrics(record)
        for sink in sinks:
            sink.log(record)
        if len(self._kinds) == (1 if self._task.evaluation is None else 2):
            require_metric(self._best.metric, self._names)
        return self._best.judge(record)

    def _when(self) -> dict[str, float | int | str]:
        """Returns the step, epoch and seconds for a record; a stream has no epoch."""
        when: dict[str, float | int | str] = {"step": self.state.step}
        if self._calendar is not None:
            when["epoch"] = self.state.epoch + self.state.step_in_epoch / self._calendar.steps_of(self.state.epoch)
        return {**when, "seconds": self.state.seconds}


_LOSS, _PREDICTIONS, _EXAMPLES = range(3)
"""Indices into the sums; the elements of `Objective.sums` follow."""


class _Window:
    """Holds sums over steps: of this rank since the last agreement, and of all ranks since the last record.

    The model's results are added on their device, so that the host need not wait for them in every step.

    Args:
        sums: initial sums over all ranks, from a checkpoint; None for a sum that is not finite.
        seconds: training time of the steps in the initial sums.
    """

    def __init__(self, sums: Sequence[float | None] = (), seconds: float = 0.0) -> None:
        self._objectives = torch.zeros(1, dtype=torch.float64)
        self._counts = torch.zeros(2, dtype=torch.float64)
        begun = [math.nan if value is None else value for value in sums]
        self._agreed = torch.tensor(begun or [0.0] * 3, dtype=torch.float64)
        self._agreed_at = time.perf_counter()
        self._reported_at = self._agreed_at - seconds

    @property
    def local(self) -> Tensor:
        """[3 + n] float64 on the CPU: loss, predictions, examples, and the n elements of `Objective.sums`."""
        objectives = to_host(self._objectives)
        return torch.cat([objectives[:1], self._counts, objectives[1:]])

    def add(self, objective: Objective, num_examples: int) -> None:
        """Adds a step of this rank."""
        total = objective.total.double().view(1)
        added = total if objective.sums is None else torch.cat([total, objective.sums.to(total)])
        self._objectives = _sum(self._objectives.to(added.device), added)
        self._counts += torch.tensor([objective.num_predictions, num_examples], dtype=torch.float64)

    def close(self, sums: Tensor) -> float:
        """Adds sums over the ranks and clears this rank's own; returns the seconds since the last call."""
        self._agreed = _sum(self._agreed, sums)
        self._objectives, self._counts = torch.zeros_like(self._objectives), torch.zeros_like(self._counts)
        now = time.perf_counter()
        seconds, self._agreed_at = now - self._agreed_at, now
        return seconds

    def open_sums(self) -> tuple[tuple[float | None, ...], float]:
        """Returns the sums over the ranks that are not reported yet, and their seconds, as `__init__` takes them."""
        sums = tuple(value if math.isfinite(value) else None for value in self._agreed.tolist())
        return sums, max(self._agreed_at - self._reported_at, 0.0)

    def leave_out_time(self) -> None:
        """Excludes the time since the last agreement, because it was not spent in training."""
        now = time.perf_counter()
        self._reported_at += now - self._agreed_at
        self._agreed_at = now

    def report(self) -> tuple[Tensor, float]:
        """Returns the sums over the ranks since the last report and their seconds, and starts new sums."""
        sums, seconds = self._agreed, max(self._agreed_at - self._reported_at, 1e-9)
        self._agreed, self._reported_at = torch.zeros_like(sums), self._agreed_at
        return sums, seconds


def _sum(total: Tensor, added: Tensor) -> Tensor:
    """Adds two vectors of sums, padding the shorter; before the first step the number of sums is unknown."""
    length = max(len(total), len(added))
    padded = [torch.nn.functional.pad(sums, (0, length - len(sums))) for sums in (total, added)]
    return padded[0] + padded[1]
