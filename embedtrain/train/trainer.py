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
"""A signal is heard after at most so many steps; agreeing at each would cost a small collective a step."""


class Trainer:
    """Trains a model to the end of its epochs or of a stream, or until it is asked to stop.

    The learning rates that the task's optimizers were made with are the base rates.

    Args:
        task: what to train.
        state: where the run is; advanced in place.
        epochs: passes over the data; a stream is read once.
        schedule: factor of every base learning rate by the share of the run that is done.
        checkpoints: when and how to save.
        ranks: those of the run.
        options: how the steps are computed.
        is_shared: no collective; returns whether all ranks failed as this one did, with an error of their own; None
            if only one process can tell.
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
        # If the host decides whether dense parameters step, it must know at once whether the gradients are finite.
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
        self._kinds: set[bool] = set()  # Of the records so far: those of the training and those of held-out data.
        self._check_counters()
        # Checkpoints of earlier versions hold no window: their records begin anew.
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
        """Trains, logs and saves; returns whether the run is complete, not merely stopped and saved.

        Collective: every rank. Rank 0 alone passes sinks.

        Args:
            sinks: take a record every `log_every_steps` steps and at the end.
            log_every_steps: how often.
            before_save: collective; called on every rank before each save, which it can prevent by raising.
            alive: called whenever this rank has got on: after each step, and now and then during a measurement.
            on_step: called after each step.
            is_asked: whether this rank is asked to stop and save, beside by a signal.
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
                # While a stream brings no batch, an agreement delays nothing.
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
        """Tells whether the last epoch, or the stream, is trained to its end, or no improvement is waited for."""
        is_at_end = self.total_steps is not None and self.state.step >= self.total_steps
        return self._is_drained or is_at_end or self._best.is_over

    def _finish_records(self, sinks: Sequence[MetricSink], alive: Callable[[], None] | None) -> None:
        """Logs and measures at a step that nobody knew to be the last. Collective: every rank."""
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
        """Refuses counters that no run over these data comes to: a run that is past its end would never end."""
        state = self.state
        if self._calendar is None:
            return
        if self._calendar.place_of(state.step) != (state.epoch, state.step_in_epoch):
            raise CorruptCheckpointError(
                f"the checkpoint's counters say step {state.step}, {state.epoch} epochs and {state.step_in_epoch} "
                f"steps, which does not add up with {self._calendar.steps_of(state.epoch)} steps per epoch"
            )

    def _or_settle(self, function: Callable[[], T]) -> T:
        try:
            return function()
        except NonFiniteError:
            # Raised on every rank alike: the checkpoint under way is what the run goes back to.
            self._checkpoints.settle()
            raise

    def _train_once(self) -> bool:
        """Trains on the next step; returns False where a stream has not brought it yet, or is over."""
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
        """Returns the schedule's factor; of a stream, whose end is not known, that of its beginning."""
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
        """Sums up what the ranks did since they last agreed; whether any wants to stop or save, or failed to save."""
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
        """Logs what was done since it last did. Collective: every rank."""
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
        """Measures on held-out data; returns whether to save now.

        It is saved if the measure is one to keep, and if the measurement failed, which must not lose what was trained.

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
                f"the evaluation at step {self.state.step:,} failed, and training goes on without its measures: "
                f"{error if isinstance(error, UserError) else f'{type(error).__name__}: {error}'}"
            )
        self._measured_step = self.state.step
        self._window.leave_out_time()
        return is_kept or error is not None

    def _take(self, record: Mapping[str, float | int | str], sinks: Sequence[MetricSink]) -> bool:
        """Hands a record on; returns whether a checkpoint of now would be kept for it. Collective: every rank."""
        self._names |= record.keys()
        self._kinds.add("loss" in record)
        self._checkpoints.take_metrics(record)
        for sink in sinks:
            sink.log(record)
        if len(self._kinds) == (1 if self._task.evaluation is None else 2):
            require_metric(self._best.metric, self._names)
        return self._best.judge(record)

    def _when(self) -> dict[str, float | int | str]:
        """Returns where the run is, as records say it; a stream has no epochs."""
        when: dict[str, float | int | str] = {"step": self.state.step}
        if self._calendar is not None:
            when["epoch"] = self.state.epoch + self.state.step_in_epoch / self._calendar.steps_of(self.state.epoch)
        return {**when, "seconds": self.state.seconds}


_LOSS, _PREDICTIONS, _EXAMPLES = range(3)
"""Places among the sums; those of `Objective.sums` follow."""


class _Window:
    """Sums over steps: this rank's since the last agreement, all ranks' since the last log.

    What a model returns is added up where it is, so that the host need not wait for it at every step.

    Args:
        sums: those that a resumed run begins with; None for one that is not finite.
        seconds: spent on them.
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
        """[3 + n] float64 on the CPU: losses, predictions, examples, and the n of `Objective.sums`."""
        objectives = to_host(self._objectives)
        return torch.cat([objectives[:1], self._counts, objectives[1:]])

    def add(self, objective: Objective, num_examples: int) -> None:
        """Counts a step of this rank."""
        total = objective.total.double().view(1)
        added = total if objective.sums is None else torch.cat([total, objective.sums.to(total)])
        self._objectives = _sum(self._objectives.to(added.device), added)
        self._counts += torch.tensor([objective.num_predictions, num_examples], dtype=torch.float64)

    def close(self, sums: Tensor) -> float:
        """Takes the sums over the ranks; returns the seconds since it last did."""
        self._agreed = _sum(self._agreed, sums)
        self._objectives, self._counts = torch.zeros_like(self._objectives), torch.zeros_like(self._counts)
        now = time.perf_counter()
        seconds, self._agreed_at = now - self._agreed_at, now
        return seconds

    def open_sums(self) -> tuple[tuple[float | None, ...], float]:
        """Returns the sums over the ranks that were not reported, as `__init__` takes them, and their seconds."""
        sums = tuple(value if math.isfinite(value) else None for value in self._agreed.tolist())
        return sums, max(self._agreed_at - self._reported_at, 0.0)

    def leave_out_time(self) -> None:
        """Has the time since the last agreement count for nothing: it was not spent in training."""
        now = time.perf_counter()
        self._reported_at += now - self._agreed_at
        self._agreed_at = now

    def report(self) -> tuple[Tensor, float]:
        """Returns the sums over the ranks since the last report, and the seconds."""
        sums, seconds = self._agreed, max(self._agreed_at - self._reported_at, 1e-9)
        self._agreed, self._reported_at = torch.zeros_like(sums), self._agreed_at
        return sums, seconds


def _sum(total: Tensor, added: Tensor) -> Tensor:
    """Adds sums, of which either may be the longer: before the first step nobody knows how many there are."""
    length = max(len(total), len(added))
    padded = [torch.nn.functional.pad(sums, (0, length - len(sums))) for sums in (total, added)]
    return padded[0] + padded[1]
