"""When a run saves, what it saves, and how it comes back."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from embedtrain.checkpoint import (
    CheckpointReader,
    CheckpointSaver,
    LoadOptions,
    SaveOptions,
    agree_on_latest,
    load_shards,
    newest_whole,
    remove_checkpoint,
    sweep_leftovers,
)
from embedtrain.checkpoint.agreement import on_first_rank
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import DEFAULT_TIMEOUT_SECONDS
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import CorruptCheckpointError, UserError, printable
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.schema import SchemaError, parse
from embedtrain.train.best import BestPolicy
from embedtrain.train.state import RunState, TrainState, read_run_state
from embedtrain.train.task import Task

_logger = logging.getLogger(__name__)

_OF_THE_BEGINNING = ("init_from", "grown_from")
"""Facts that are known to the first of a run's jobs; the others take them over."""


@dataclass(frozen=True)
class SavePolicy:
    """When to save beside the end of the run, and how.

    Attributes:
        every_steps: steps between two checkpoints; None leaves it to the clock.
        every_seconds: seconds between two checkpoints, by rank 0's clock; None leaves it to the steps.
        options: how to save.
        timeout_seconds: how long the ranks wait for each other while they save in the background.
        best: which measurements are saved at once, and end the training.
    """

    every_steps: int | None = None
    every_seconds: float | None = 600.0
    options: SaveOptions = field(default_factory=SaveOptions)
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    best: BestPolicy = field(default_factory=BestPolicy)

    def is_due(self, step: int) -> bool:
        """Returns whether the count of steps asks for a checkpoint; alike on every rank."""
        return self.every_steps is not None and step % self.every_steps == 0


@dataclass(frozen=True)
class ResumePolicy:
    """How a run comes back.

    Attributes:
        on_corrupt: "error" refuses a damaged newest checkpoint; "fallback" takes the newest older one that is
            whole, and deletes the damaged ones after it.
        load: what may differ between the checkpoint and the run.
    """

    on_corrupt: Literal["error", "fallback"] = "error"
    load: LoadOptions = field(default_factory=LoadOptions)


class Checkpoints:
    """Saves and restores tables, optimizer and counters of a run.

    Collective: every rank makes one.

    Args:
        path: folder of the checkpoints.
        task: what is trained: tables, dense parameters, and their optimizers' states.
        state: the run's counters.
        facts: what else belongs in each checkpoint, as JSON: the configuration, the data's fingerprint.
        policy: when to save, and how.
        resume: how to come back.
        ranks: those of the run.

    Attributes:
        metrics: the newest value of each measure, saved with each checkpoint.
        measured_at: by measure, the step of this value.

    Raises:
        UserError: on every rank alike; the facts are not what `RunState` declares.
    """

    def __init__(
        self,
        path: str,
        task: Task,
        state: TrainState,
        *,
        facts: Mapping[str, Any],
        policy: SavePolicy,
        ranks: Ranks,
        resume: ResumePolicy | None = None,
    ) -> None:
        self.policy = policy
        self.metrics: Mapping[str, Any] = {}
        self.measured_at: Mapping[str, int] = {}
        self._path = path
        self._tables = task.tables
        self._optimizer = task.optimizer
        self._dense = task.dense
        self._state = state
        self._facts = facts
        self._ranks = ranks
        self._resume = resume or ResumePolicy()
        is_async = policy.options.mode == "async"
        in_background = ranks.for_thread(policy.timeout_seconds) if is_async else None
        self._saver = CheckpointSaver(path, ranks, in_background, policy.options)
        self._saved_at_seconds = time.monotonic()
        # A run could not resume from checkpoints with other facts, and would find that out after it was trained.
        ranks.run_on_each(self._check_facts)

    @property
    def has_failed(self) -> bool:
        """Returns whether this rank knows of a save in the background that failed; then all ranks `settle`."""
        return self._saver.has_failed

    def take_metrics(self, record: Mapping[str, Any]) -> None:
        """Takes a record of now, for the checkpoints from now on."""
        self.metrics = {**self.metrics, **record}
        self.measured_at = {**self.measured_at, **dict.fromkeys(record, self._state.step)}

    @property
    def complete_step(self) -> int | None:
        """Returns the step of the newest checkpoint that this rank knows to be complete; None if there is none."""
        return self._saver.complete_step

    def is_overdue(self) -> bool:
        """Returns whether this rank's clock asks for a checkpoint."""
        every = self.policy.every_seconds
        return every is not None and time.monotonic() - self._saved_at_seconds >= every

    def save(self, *, is_last: bool = False) -> None:
        """Saves the run as it stands, unless it was saved at this very step. Collective: every rank.

        Args:
            is_last: whether the checkpoint must be durable on return, as at the end of the run.

        Raises:
            CheckpointError: on every rank alike; more saves in a row failed than are tolerated, or the last.
        """
        if is_last:
            self._saver.settle()
        if self._saver.step == self._state.step:
            return
        self._saved_at_seconds = time.monotonic()
        saved = self._saved_state()
        replicated = {} if self._dense is None else self._dense.tensors()
        self._saver.save(self._state.step, self._tables.shard_views(), saved, replicated, is_last=is_last)

    def _saved_state(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside tensors, as JSON; `RunState` declares it."""
        metrics = {name: value for name, value in self.metrics.items() if _is_json(value)}
        saved: dict[str, Any] = {
            **self._facts,
            "train": self._state.as_json(),
            "metrics": metrics,
            "measured_at": {name: self.measured_at[name] for name in metrics},
            "optimizer": {
                "name": self._optimizer.name,
                "param_groups": self._optimizer.state_dict()["param_groups"],
                "num_skipped": self._optimizer.num_skipped,
            },
            "pooling": self._tables.pooling_choices,
        }
        if self._dense is not None:
            saved["dense_optimizer"] = {"name": self._dense.name}
        return saved

    def _check_facts(self) -> None:
        try:
            parse(RunState, self._saved_state())
        except SchemaError as error:
            raise UserError(f"no checkpoint can hold the facts of this run, see Parts.facts: {error}") from error

    def settle(self) -> None:
        """Waits for a save in the background and raises what it failed with, if it fails the run.

        Collective: every rank.
        """
        self._saver.settle()

    def restore(self) -> bool:
        """Takes over the newest complete checkpoint, if there is one. Collective: every rank.

        Raises:
            UserError: the checkpoint was made with another optimizer or from other data.
            CorruptCheckpointError: it is damaged, and `on_corrupt` is "error" or there is no older one that is whole.
            CheckpointError: its tensors are not those of the tables.
        """
        damaged: list[str] = []
        while (chosen := agree_on_latest(self._path, self._ranks, before=damaged[-1] if damaged else None)) is not None:
            error = self._try(chosen)
            faults = [fault for fault in self._ranks.all_gather(_corruption(error)) if fault is not None]
            if not faults:
                self._ranks.fail_together(error)
                break
            if self._resume.on_corrupt == "error":
                raise CorruptCheckpointError(f"{faults[0]}. {self._hint(chosen)}") from error
            if self._ranks.rank == 0:
                _logger.warning(f"{faults[0]}. {chosen} is damaged and is deleted; taking an older one")
            damaged.append(chosen)
        if chosen is None and damaged:
            raise CorruptCheckpointError(f"none of the checkpoints in {self._path} is whole: {', '.join(damaged)}")
        if chosen is None:
            return False
        # Training comes past their steps again, and a complete checkpoint is never overwritten.
        on_first_rank("damaged checkpoints were not deleted", lambda: _remove(damaged), self._ranks)
        sweep_leftovers(self._path, self._ranks)
        self._saver.take_over(self._state.step)
        return True

    def _try(self, path: str) -> Exception | None:
        try:
            with CheckpointReader(path) as reader:
                self._take_over(reader, path)
        except Exception as error:
            return error
        return None

    def _hint(self, path: str) -> str:
        older = on_first_rank("looking for an older checkpoint", lambda: newest_whole(self._path, path), self._ranks)
        if older is None:
            return "No older checkpoint is whole either."
        return f"{older} is the newest that is whole: resume.on_corrupt=fallback resumes from it."

    def _take_over(self, reader: CheckpointReader, path: str) -> None:
        saved, load = read_run_state(reader.manifest, path), self._resume.load
        is_reset = load.optimizer_state == "reset"
        expected = {"optimizer": (saved.optimizer.name, self._optimizer.name)}
        if self._dense is not None:
            was = "no such optimizer" if saved.dense_optimizer is None else saved.dense_optimizer.name
            expected["dense optimizer"] = (was, self._dense.name)
        for role, (was, name) in expected.items():
            if was != name and not is_reset:
                raise UserError(
                    f"{path} holds the state of {printable(was)}, and this run's {role} is {name}: "
                    "resume.optimizer_state=reset starts its state anew"
                )
        if saved.data_fingerprint != self._facts["data_fingerprint"]:
            raise UserError(
                f"{path} was trained on other data than data.path holds now: start anew with another run.path, or "
                "bring back the data and the options under `data` that the run began with"
            )
        groups = saved.optimizer.param_groups
        if len(groups) != len(self._optimizer.param_groups) and not is_reset:
            raise CorruptCheckpointError(
                f"{path}: optimizer.param_groups: expected {len(self._optimizer.param_groups)}, found {len(groups)}"
            )
        left_out = load_shards(reader, self._tables.shard_views(), load)
        if self._dense is not None:
            self._dense.load_tensors(reader.replicated(), with_state=not is_reset)
        if left_out and self._ranks.rank == 0:
            _logger.warning(f"not taken from {path}, as asked, but started anew: {', '.join(left_out)}")
        begun = {key: reader.state[key] for key in _OF_THE_BEGINNING if reader.state.get(key)}
        kept = {key: {**facts, **self._facts.get(key, {})} for key, facts in begun.items()}
        self._facts = {**self._facts, **kept}
        self._state.restore(saved.train)
        self.metrics = saved.metrics
        self.measured_at = {**dict.fromkeys(saved.metrics, reader.step), **saved.measured_at}
        if saved.pooling is not None:
            self._tables.pooling_choices = asdict(saved.pooling)
        self._optimizer.num_skipped = saved.optimizer.num_skipped
        if is_reset:
            return
        if not reader.manifest.table_steps:
            # A checkpoint of an earlier version. The rest of the settings is this run's configuration, which the caller
            # has compared with the saved one.
            for settings, group in zip(self._optimizer.param_groups, groups, strict=True):
                settings["step"] = group["step"]


def load_weights(path: str, tables: EmbeddingCollection, dense: DenseOptimizer | None, data_fingerprint: str) -> int:
    """Loads tables and dense parameters of a checkpoint, to be used and not trained.

    Collective: every rank.

    Args:
        path: the checkpoint.
        tables: take the rows; their optimizer's state is left as it is.
        dense: takes the dense parameters; None if the model has none.
        data_fingerprint: of the data that its rows are used with.

    Returns:
        The step of the checkpoint.

    Raises:
        UserError: it was trained on other data.
        CheckpointError: its tensors are not those of the tables, or it is damaged or was deleted meanwhile.
    """
    views = tables.shard_views()

    def load() -> int:
        with CheckpointReader(path) as reader:
            if read_run_state(reader.manifest, path).data_fingerprint != data_fingerprint:
                raise UserError(
                    f"{path} was trained on other data than those that the run has now: the rows of its tables do not "
                    "belong to these data"
                )
            load_shards(reader, views, LoadOptions(optimizer_state="reset"))
            if dense is not None:
                dense.load_tensors(reader.replicated(), with_state=False)
            return reader.step

    # What one rank cannot read fails on all: else the others would wait for it in the next collective.
    return tables.ranks.run_on_each(load)


def _corruption(error: Exception | None) -> str | None:
    return str(error) if isinstance(error, CorruptCheckpointError) else None


def _remove(paths: list[str]) -> None:
    for path in paths:
        remove_checkpoint(path)


def _is_json(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
