"""A search for the best settings: what is varied, and which trial comes next. Optuna chooses and remembers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import yaml

from embedtrain.errors import UserError

if TYPE_CHECKING:
    import optuna

JOURNAL_NAME = "search.journal"
"""The file in the folder of a search that holds all trials; every change is appended to it."""

_FIRST_RUNG = 11
_REDUCTION = 3
"""After 11 % of its steps, and again after 33 %, a trial ends unless it is among the best third of those so far."""

_LAST_RUNG = 99
"""From here on, in % of its steps, a trial ends by itself; the pruner would have a third rung at 99 %."""

_DIGITS = 4
_OUTCOME, _SECONDS, _BEST, _EPOCH = "outcome", "seconds", "best", "epoch"
_SPACE, _JUDGED_BY = "space", "judged_by"
_KEPT = "kept"
"""Settings that are `null` in the configuration, for which the model has a rule: the first trial keeps them."""

Outcome = Literal["complete", "stopped", "out of time", "failed", "refused"]
"""How a trial ended. The settings of a refused one cannot be used together: it is not counted."""


@dataclass(frozen=True)
class Choices:
    """A setting that is one of several values.

    Attributes:
        values: as they stand behind `key=`.
    """

    values: Sequence[str]

    def draw(self, trial: optuna.trial.Trial, key: str) -> str:
        """Returns the value of a trial."""
        return str(trial.suggest_categorical(key, list(self.values)))

    def extremes(self) -> Sequence[str]:
        """Returns values that must all be allowed."""
        return self.values

    def start(self, value: Any) -> Any:
        """Returns the trial's form of a setting's value; None if it is none of these."""
        return next((each for each in self.values if _same(yaml.safe_load(each), value)), None)


@dataclass(frozen=True)
class Range:
    """A setting that is a number between two others.

    Attributes:
        low: the smallest.
        high: the largest.
        is_log: whether it is drawn on a logarithmic scale.
        is_whole: whether it has no fraction.
    """

    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False

    def draw(self, trial: optuna.trial.Trial, key: str) -> str:
        """Returns the value of a trial, with few digits."""
        if self.is_whole:
            return str(trial.suggest_int(key, int(self.low), int(self.high), log=self.is_log))
        return f"{trial.suggest_float(key, self.low, self.high, log=self.is_log):.{_DIGITS}g}"

    def extremes(self) -> Sequence[str]:
        """Returns values that must all be allowed."""
        return [str(int(value)) if self.is_whole else f"{value:.{_DIGITS}g}" for value in (self.low, self.high)]

    def start(self, value: Any) -> Any:
        """Returns the trial's form of a setting's value; None if it is not between these."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and self.low <= value <= self.high else None


Space = Mapping[str, Choices | Range]


def read_space(declared: Mapping[str, Any], source: str) -> dict[str, Choices | Range]:
    """Returns what is searched.

    Args:
        declared: by setting, a list of values, a mapping of `low`, `high` and perhaps `log`, or a text of either:
            "0.03:0.3:log" or "1,2,4".
        source: where it was declared, for messages.

    Raises:
        UserError: a declaration is none of these.
    """
    return {key: _read_one(f"{source}: {key}", value) for key, value in declared.items()}


def _read_one(where: str, declared: Any) -> Choices | Range:
    if isinstance(declared, str):
        parts = declared.split(":")
        if len(parts) in (2, 3) and parts[2:] in ([], ["log"]):
            declared = {"low": parts[0], "high": parts[1], "log": len(parts) == 3}
        else:
            declared = declared.split(",")
    if isinstance(declared, Mapping) and {"low", "high"} <= declared.keys() <= {"low", "high", "log"}:
        return _read_range(where, declared)
    if isinstance(declared, Sequence) and declared and "" not in declared:
        return Choices([each if isinstance(each, str) else json.dumps(each) for each in declared])
    raise UserError(
        f"{where}: expected a list of values, or a range such as {{low: 0.03, high: 0.3, log: true}}, got {declared!r}"
    )


def _read_range(where: str, declared: Mapping[str, Any]) -> Range:
    try:
        low, high = (_number(declared[name]) for name in ("low", "high"))
    except ValueError:
        raise UserError(f"{where}: expected two numbers, got {declared['low']!r} and {declared['high']!r}") from None
    is_log = declared.get("log", False)
    if not isinstance(is_log, bool):
        raise UserError(f"{where}: expected log: true or log: false, got {is_log!r}")
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (is_log and low <= 0):
        raise UserError(
            f"{where}: expected a range from a number to a larger one{', both above 0' if is_log else ''}, got "
            f"{declared['low']} to {declared['high']}"
        )
    return Range(low, high, is_log, isinstance(low, int) and isinstance(high, int))


def _number(value: Any) -> int | float:
    if isinstance(value, bool):
        raise ValueError("a truth value is not a number")
    text = str(value)
    try:
        return int(text)
    except ValueError:
        return float(text)


def _same(first: Any, second: Any) -> bool:
    return first == second and isinstance(first, bool) == isinstance(second, bool)


@dataclass(frozen=True)
class Trial:
    """A run of the search, before or after it is trained.

    Attributes:
        number: from 0.
        settings: `key=value` each.
        outcome: how it ended; None if it has not.
        best: its best measurement; None without one.
        epoch: when that was measured.
        seconds: of the run.
    """

    number: int
    settings: Sequence[str]
    outcome: Outcome | None = None
    best: float | None = None
    epoch: float | None = None
    seconds: float = 0.0


class Search:
    """The trials of a search, in a local folder: rank 0 has it, and asks for one trial after the other.

    Args:
        folder: a local folder that exists, and that no other job works in.
        space: what is searched.
        judged_by: says what trials are judged by.
        is_largest_best: whether the largest measurements are the best.
        seed: of the choice of settings.
        start: by setting, its value without a search: the first trial takes those that are in the space, and null.

    Raises:
        UserError: Optuna is not installed, or the folder holds another search.
    """

    def __init__(
        self,
        folder: str,
        space: Space,
        *,
        judged_by: str,
        is_largest_best: bool,
        seed: int,
        start: Mapping[str, Any],
    ) -> None:
        optuna = require_optuna()
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        journal = f"{folder}/{JOURNAL_NAME}"
        _clear(journal)
        storage = optuna.storages.JournalStorage(JournalFileBackend(journal))
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=_FIRST_RUNG, reduction_factor=_REDUCTION)
        self._study = optuna.create_study(
            storage=storage,
            study_name="tune",
            direction="maximize" if is_largest_best else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
        self._space, self._sign = space, -1 if is_largest_best else 1
        facts = json.dumps({key: str(each) for key, each in space.items()}, sort_keys=True)
        known = self._study.user_attrs
        if known.get(_SPACE, facts) != facts:
            raise UserError(f"{folder} holds a search of other settings: give the same, or another --output")
        if known.get(_JUDGED_BY, judged_by) != judged_by:
            raise UserError(
                f"{folder} holds a search that judges trials by {known[_JUDGED_BY]}, not by {judged_by}: give the same "
                "settings, or another --output"
            )
        # Draws after a restart must not repeat those from before.
        self._study.sampler = optuna.samplers.TPESampler(seed=seed + len(self._study.trials))
        if not self._study.trials:
            self._study.set_user_attr(_SPACE, facts)
            self._study.set_user_attr(_JUDGED_BY, judged_by)
            first = {key: each.start(start[key]) for key, each in space.items() if key in start}
            kept = [key for key, value in first.items() if value is None and start[key] is None]
            self._study.enqueue_trial(
                {key: value for key, value in first.items() if value is not None}, user_attrs={_KEPT: kept}
            )

    def next(self) -> Trial:
        """Returns the trial that a killed job left, or a new one."""
        optuna = require_optuna()
        left = self._study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        trial = optuna.trial.Trial(self._study, left[0]._trial_id) if left else self._study.ask()
        kept = trial.user_attrs.get(_KEPT, ())
        values = {key: "null" if key in kept else each.draw(trial, key) for key, each in self._space.items()}
        return Trial(trial.number, [f"{key}={value}" for key, value in values.items()])

    def report(self, number: int, share: float, value: float) -> bool:
        """Takes a measurement of a trial that is being trained; returns whether the trial is not worth going on with.

        Args:
            number: of the trial.
            share: of its steps that are done, in (0, 1].
            value: the measurement.
        """
        optuna = require_optuna()
        found = self._study.trials[number]
        trial = optuna.trial.Trial(self._study, found._trial_id)
        step = max(1, math.floor(100 * share))
        if step not in found.intermediate_values:
            trial.report(value, step)
        return step < _LAST_RUNG and bool(trial.should_prune())

    def finish(self, number: int, outcome: Outcome, best: tuple[float, float] | None, seconds: float) -> None:
        """Notes how a trial ended.

        Args:
            number: of the trial.
            outcome: how.
            best: its best measurement, and the epoch of it.
            seconds: that it took.
        """
        state = require_optuna().trial.TrialState
        trial = require_optuna().trial.Trial(self._study, self._study.trials[number]._trial_id)
        trial.set_user_attr(_SECONDS, seconds)
        if best is not None:
            trial.set_user_attr(_BEST, best[0])
            trial.set_user_attr(_EPOCH, best[1])
        if outcome == "complete" and best is None:
            outcome = "failed"
        trial.set_user_attr(_OUTCOME, outcome)
        if outcome == "complete":
            assert best is not None
            self._study.tell(number, best[0])
        else:
            # Of a refused trial the sampler learns to keep away; it ignores failed ones, and would come back to them.
            self._study.tell(number, state=state.FAIL if outcome == "failed" else state.PRUNED)

    def trials(self) -> list[Trial]:
        """Returns the trials that ended, in their order."""
        found = []
        for each in self._study.trials:
            facts = each.user_attrs
            if facts.get(_OUTCOME) is not None:
                values = {
                    key: _text(each.params[key], kind) if key in each.params else "null"
                    for key, kind in self._space.items()
                }
                settings = [f"{key}={value}" for key, value in values.items()]
                found.append(
                    Trial(each.number, settings, facts[_OUTCOME], facts.get(_BEST), facts.get(_EPOCH), facts[_SECONDS])
                )
        return found

    def best(self) -> Trial | None:
        """Returns the trial with the best measurement, of complete ones if there are any; None without one."""
        measured = [
            trial for trial in self.trials() if trial.best is not None and trial.outcome not in ("failed", "refused")
        ]
        complete = [trial for trial in measured if trial.outcome == "complete"]
        return min(complete or measured, key=lambda trial: self._sign * float(trial.best or 0.0), default=None)


def _clear(journal: str) -> None:
    """Removes what a killed job left: the lock that nobody would give back, and a line that it did not finish."""
    with suppress(FileNotFoundError):
        os.unlink(f"{journal}.lock")
    with suppress(FileNotFoundError), open(journal, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)


def _text(value: Any, kind: Choices | Range) -> str:
    if isinstance(kind, Choices) or kind.is_whole:
        return str(value)
    return f"{value:.{_DIGITS}g}"


def require_optuna() -> Any:
    """Returns the package Optuna.

    Raises:
        UserError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError("a search for settings needs Optuna: pip install 'embedtrain[tune]'") from error
    return optuna
