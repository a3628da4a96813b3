"""`embedtrain tune`: searches for the settings that do best on validation data."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from embedtrain import storage
from embedtrain.commands.console import (
    EXIT_DONE,
    ConfigFile,
    command,
    is_debugged,
    require_config,
    say,
    say_once,
    settings_argument,
    tell,
)
from embedtrain.errors import NonFiniteError, UserError, counted

if TYPE_CHECKING:
    from embedtrain.config.sections import Config
    from embedtrain.metrics.sinks import Record, RunEnd
    from embedtrain.planning.search import Outcome, Search, Space, Trial
    from embedtrain.recipes.base import Tuning

BASE_NAME, BEST_NAME, TABLE_NAME = "base.yaml", "best.yaml", "trials.md"
"""Files in the folder of a search: what the trials share, the configuration of the best, and a table of all."""

_MAX_REFUSED = 20
"""Number of refused trials in a row after which a search ends."""


@command(
    "embedtrain tune retrieval data.path=train.txt --minutes 60",
    "embedtrain tune retrieval data.path=train.txt --trials 20 --search optimizer.lr=0.03:0.3:log",
)
@click.argument(
    "config", type=ConfigFile(), help="YAML file that all trials share; its section `tune` says what to search."
)
@settings_argument
@click.option(
    "--trials", type=click.IntRange(1), metavar="N", help="Number of runs, including the runs of an earlier job."
)
@click.option(
    "--minutes", type=float, metavar="M", help="Duration of the search, including the time of an earlier job."
)
@click.option(
    "--search",
    multiple=True,
    metavar="KEY=VALUES",
    help="A setting to search: KEY=1,2,4 or KEY=LOW:HIGH or KEY=LOW:HIGH:log. By default, what the section `tune` "
    "says, or else what the model proposes.",
)
@click.option(
    "--output",
    default="runs/tune",
    show_default=True,
    metavar="PATH",
    type=click.Path(file_okay=False),
    help="Local folder of the trials; the same command continues the search.",
)
def tune(
    config: str, settings: Sequence[str], trials: int | None, minutes: float | None, search: Sequence[str], output: str
) -> int:
    """Searches for the settings that do best on validation data."""
    if trials is None and minutes is None:
        raise UserError("how long may the search take? Give --trials N, --minutes M or both")
    if minutes is not None and not 0 < minutes < math.inf:
        raise UserError(f"expected --minutes above 0, got {minutes:g}")
    budget = Budget(math.inf if trials is None else trials, math.inf if minutes is None else 60 * minutes)
    plan = Plan(*require_config(config, settings), search, output)
    from embedtrain.commands.job import train_trials

    return train_trials(lambda: plan.trials(budget), plan.folder, plan.base, plan.load, is_debugged=is_debugged())


@dataclass(frozen=True)
class Budget:
    """How much a search may take, over all jobs.

    Attributes:
        trials: how many runs.
        seconds: of training.
    """

    trials: float
    seconds: float


class Plan:
    """What is searched, and what all trials share.

    Args:
        path: the configuration file.
        overrides: `key=value` each, of all trials.
        search: `KEY=VALUES` each.
        folder: of the search.

    Attributes:
        base: the configuration without what is searched.
        metric: what trials are judged by.
        space: what is searched.
        tuning: of the model.
        folder: of the search.

    Raises:
        UserError: the model or the data cannot be tuned so, or a setting is wrong.
    """

    def __init__(self, path: str | None, overrides: Sequence[str], search: Sequence[str], folder: str) -> None:
        from embedtrain.planning.search import read_space
        from embedtrain.recipes.loading import declared_search, load_config
        from embedtrain.recipes.registry import recipe_of

        self.folder = folder.rstrip("/")
        if storage.local_path(self.folder) is None:
            raise UserError(f"--output {folder}: expected a local folder, in which a search can append to a file")
        self._path, self._overrides = path, list(overrides)
        if any(override.startswith("run.path=") for override in overrides):
            raise UserError("tune gives each trial a run.path of its own: leave it out; --output names their folder")
        self.base = load_config(path, self._overrides)
        tuning: Tuning[Any] | None = recipe_of(self.base.model).tuning
        if tuning is None:
            raise UserError(f"model={self.base.model} has nothing that tune could judge by")
        self.tuning = tuning
        self._require_validation()
        declared = {} if path is None else declared_search(path)
        given = [_split(each) for each in search]
        if len(dict(given)) < len(given):
            raise UserError("--search names a key twice: give all its values in one --search")
        declared.update(given)
        self.space: Space = read_space(declared or tuning.space(self.base), "--search" if search else "tune")
        metric = self.base.checkpoint.best_metric
        self.metric = tuning.metric(self.base) if metric == "loss" else metric
        self._check()

    def load(self, settings: Sequence[str]) -> Config:
        """Returns the configuration of a trial: its own settings behind those of all."""
        from embedtrain.recipes.loading import load_config

        return load_config(self._path, _last_of_each([*self._overrides, *settings]))

    def trials(self, budget: Budget) -> TunedTrials:
        """Opens the search in the folder, which this job holds, for rank 0."""
        from embedtrain.checkpoint.retention import mode_of_best
        from embedtrain.config.resolved import differing_keys, to_yaml
        from embedtrain.config.values import flatten, settings_of
        from embedtrain.planning.search import Search

        base_path = f"{self.folder}/{BASE_NAME}"
        if os.path.exists(base_path):
            searched = (*self.space, "run.path")
            with open(base_path, encoding="utf-8") as file:
                if differing := differing_keys(file.read(), self.base, searched):
                    raise UserError(
                        f"{self.folder} holds a search with other settings: {'; '.join(differing)}. Give the settings "
                        "that it began with, or another --output"
                    )
        else:
            storage.replace(base_path, to_yaml(self.base).encode(), f"{base_path}.tmp")
        is_largest_best = mode_of_best(self.metric, self.base.checkpoint.best_mode) == "max"
        search = Search(
            self.folder,
            self.space,
            judged_by=self._judgement(is_largest_best=is_largest_best),
            is_largest_best=is_largest_best,
            seed=self.base.seed,
            start=dict(flatten(settings_of(self.base))),
        )
        return TunedTrials(self, search, budget, is_largest_best=is_largest_best)

    def _judgement(self, *, is_largest_best: bool) -> str:
        """Says what trials are judged by; measurements of another judgement cannot be compared."""
        epochs = "" if "train.epochs" in self.space else f" of {counted(self.base.train.epochs, 'epoch')}"
        return f"the {'largest' if is_largest_best else 'smallest'} {self.metric}{epochs}"

    def _require_validation(self) -> None:
        if self.tuning.has_validation(self.base):
            return
        if not self.tuning.split_off:
            raise UserError(
                f"tune judges trials on validation data alone, and this run of model={self.base.model} has none: name "
                "them in its configuration"
            )
        self._overrides = _last_of_each([*self._overrides, *self.tuning.split_off])
        self.base = self.load([])
        say_once(f"trials are judged on a part of the training data: {' '.join(self.tuning.split_off)}")

    def _check(self) -> None:
        """Refuses what no trial could do, before the first one."""
        for key, each in self.space.items():
            if key.startswith(("run.", "data.", "evaluate.", "checkpoint.", "model", "seed")):
                raise UserError(f"tune does not search {key}, which changes what is measured or kept, not how well")
            for value in each.extremes():
                self.load([f"{key}={value}"])
        if self.base.publish.to is not None:
            raise UserError("tune trains many runs, and publish.to is for one: leave it out, and publish the best")
        if self.base.reads_standard_input:
            raise UserError("tune trains on the same data many times, and data.path=- comes once: write it to a file")


class TunedTrials:
    """The trials of a search; see `embedtrain.commands.job.Trials`.

    Args:
        plan: what they share.
        search: what chooses.
        budget: how much they may take.
        is_largest_best: whether the largest measurements are the best.
    """

    def __init__(self, plan: Plan, search: Search, budget: Budget, *, is_largest_best: bool) -> None:
        self._plan, self._search, self._budget = plan, search, budget
        self._is_largest_best = is_largest_best
        self._current: Trial | None = None
        self._watch: TrialWatch | None = None
        self._began = 0.0
        self._num_refused = 0

    def next(self) -> Sequence[str] | None:
        """Returns the settings of the next trial; None when the budget is used up.

        Raises:
            UserError: too many trials in a row were refused.
        """
        done = self._search.trials()
        while len(_trained(done)) < self._budget.trials and self._seconds_left(done) > 0:
            if self._num_refused == _MAX_REFUSED:
                raise UserError(
                    f"the settings of {_MAX_REFUSED} trials in a row cannot be used, for the reasons above: search "
                    "other values, or give another --output"
                )
            self._current = self._search.next()
            self._began = time.monotonic()
            say(f"trial {self._current.number}: {' '.join(self._current.settings)}")
            try:
                self._plan.load(self._current.settings)
            except UserError as error:
                # Each value can be used, as was checked before, but not all of them together.
                say(f"trial {self._current.number}: refused: {error}")
                self._end("refused", None, 0.0)
                continue
            return [*self._current.settings, f"run.path={self._path_of(self._current)}"]
        return None

    def watch(self) -> TrialWatch:
        """Returns what stops the current trial if it is not worth going on with, or the time is over."""
        assert self._current is not None
        number, epochs = self._current.number, self._plan.load(self._current.settings).train.epochs

        def is_hopeless(epoch: float, value: float) -> bool:
            return self._search.report(number, epoch / epochs, value)

        self._watch = TrialWatch(
            self._plan.metric, is_hopeless, self._began + self._seconds_left(self._search.trials())
        )
        return self._watch

    def take(self, status: int, error: Exception | None) -> bool:
        """Notes how the current trial ended; False if the job itself was asked to stop or has failed."""
        from embedtrain.train.interrupt import EXIT_PREEMPTED

        assert self._current is not None
        assert self._watch is not None
        outcome: Outcome
        if isinstance(error, NonFiniteError):
            outcome = "failed"
        elif status == EXIT_DONE:
            outcome = "complete"
        elif status == EXIT_PREEMPTED and self._watch.reason is not None:
            outcome = self._watch.reason
        elif isinstance(error, UserError) and self._search.best() is not None:
            # Other settings could be used with these data: it is for this trial's that they cannot.
            outcome = "refused"
        else:
            return False
        best = self._best_of(self._current)
        seconds = time.monotonic() - self._began
        self._end(outcome, best, seconds)
        shown = "no measurement" if best is None else f"{self._plan.metric} {best[0]:.6g} at epoch {best[1]:g}"
        say(f"trial {self._current.number}: {outcome}, {shown}, {seconds:.0f} s")
        self._write()
        return True

    def _end(self, outcome: Outcome, best: tuple[float, float] | None, seconds: float) -> None:
        assert self._current is not None
        self._num_refused = self._num_refused + 1 if outcome == "refused" else 0
        self._search.finish(self._current.number, outcome, best, seconds)

    def finish(self) -> None:
        """Says which settings are the best, and how to train with them."""
        tell(*self._write())

    def _seconds_left(self, done: Sequence[Trial]) -> float:
        return self._budget.seconds - sum(trial.seconds for trial in done)

    def _path_of(self, trial: Trial) -> str:
        return f"{self._plan.folder}/trial-{trial.number:04d}"

    def _best_of(self, trial: Trial) -> tuple[float, float] | None:
        """Returns the best measurement of a trial's records and its epoch; None without one."""
        from embedtrain.train.run_folder import RunFolder

        records = RunFolder(self._path_of(trial)).read_metrics()
        metric = self._plan.metric
        found = [(float(r[metric]), float(r["epoch"])) for r in records if r.get(metric) is not None]
        sign = -1 if self._is_largest_best else 1
        return min(found, key=lambda each: sign * each[0], default=None)

    def _length_of(self, best: Trial) -> list[str]:
        """Returns the settings of a run that ends where a trial was the best, with the rates that the trial had."""
        config = self._plan.load(best.settings)
        # A measurement within an epoch counts as one at its end.
        num_epochs, of_schedule = math.ceil(best.epoch or 1), config.schedule.epochs or config.train.epochs
        length = [f"train.epochs={num_epochs}"]
        has_rates = config.schedule.name != "constant" or config.schedule.warmup > 0
        return [*length, f"schedule.epochs={of_schedule}"] if has_rates and of_schedule != num_epochs else length

    def _write(self) -> list[str]:
        """Writes the table and the best configuration; returns the lines that say what came of the search."""
        from embedtrain.config.resolved import to_yaml

        trials, best = self._search.trials(), self._search.best()
        sign = -1 if self._is_largest_best else 1
        ordered = sorted(trials, key=lambda trial: math.inf if trial.best is None else sign * trial.best)
        _put(f"{self._plan.folder}/{TABLE_NAME}", _table(ordered, self._plan))
        if best is None:
            return [f"no trial has a {self._plan.metric}: nothing was found"]
        final = _last_of_each([*best.settings, *self._length_of(best), *self._plan.tuning.final])
        config = self._plan.load([*final, f"run.path={self._plan.folder}/best"])
        _put(f"{self._plan.folder}/{BEST_NAME}", to_yaml(config))
        how_many = counted(len(_trained(trials)), "trial")
        return [
            f"{how_many}, the best by {self._plan.metric} on validation data: trial {best.number}, "
            f"{best.best:.6g} at epoch {best.epoch:g}; all are in {self._plan.folder}/{TABLE_NAME}",
            f"its settings:    {' '.join(final)}",
            f"train with them: embedtrain train {self._plan.folder}/{BEST_NAME}",
        ]


@dataclass
class TrialWatch:
    """Stops a trial by its measurements, or when the time is over; a sink of its records.

    Attributes:
        metric: what it is judged by.
        is_hopeless: takes an epoch and its measurement.
        deadline: by the monotonic clock.
        reason: why it was stopped; None if it was not.
    """

    metric: str
    is_hopeless: Callable[[float, float], bool]
    deadline: float
    reason: Outcome | None = field(default=None, init=False)

    def log(self, record: Record) -> None:
        """Takes a record; a measurement is judged."""
        value = record.get(self.metric)
        if self.reason is None and value is not None and self.is_hopeless(float(record["epoch"]), float(value)):
            self.reason = "stopped"

    def is_asked(self) -> bool:
        """Returns whether the trial shall stop."""
        if self.reason is None and time.monotonic() >= self.deadline:
            self.reason = "out of time"
        return self.reason is not None

    def flush(self) -> None:
        """Does nothing: the journal has all there is."""

    def close(self, end: RunEnd) -> None:
        """Does nothing."""


def _trained(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.outcome != "refused"]


def _table(trials: Sequence[Trial], plan: Plan) -> str:
    lines = [f"| trial | {plan.metric} | epoch | outcome | seconds | {' | '.join(plan.space)} |"]
    lines.append("| --- " * (5 + len(plan.space)) + "|")
    for trial in trials:
        values = [setting.partition("=")[2] for setting in trial.settings]
        best = ["", ""] if trial.best is None else [f"{trial.best:.6g}", f"{trial.epoch:g}"]
        lines.append(f"| {trial.number} | {' | '.join([*best, str(trial.outcome), f'{trial.seconds:.0f}', *values])} |")
    return "\n".join(lines) + "\n"


def _put(path: str, text: str) -> None:
    storage.replace(path, text.encode(), f"{path}.tmp")


def _split(text: str) -> tuple[str, str]:
    key, equals, values = text.partition("=")
    if not equals or not key or not values:
        raise UserError(f"expected --search KEY=VALUES, such as optimizer.lr=0.03:0.3:log, got {text!r}")
    return key, values


def _last_of_each(settings: Sequence[str]) -> list[str]:
    """Returns the last value of each key, which is the one that counts."""
    places = {setting.partition("=")[0]: place for place, setting in enumerate(settings)}
    return [settings[place] for place in sorted(places.values())]
