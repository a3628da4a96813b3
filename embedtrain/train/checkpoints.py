"""Saves and restores the checkpoints of a run."""

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
"""Facts that only the first job of a run knows. Resumed jobs copy them from the checkpoint."""


@dataclass(frozen=True)
class SavePolicy:
    """Configures when and how to save. The end of the run is always saved.

    Attributes:
        every_steps: steps between two checkpoints; None saves by time only.
        every_seconds: seconds between two checkpoints, by rank 0's clock; None saves by steps only.
        options: options of the saver.
        timeout_seconds: timeout of collectives between the background threads that save.
        best: when to save a checkpoint for a measurement, and when to stop early.
    """

    every_steps: int | None = None
    every_seconds: float | None = 600.0
    options: SaveOptions = field(default_factory=SaveOptions)
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS
    best: BestPolicy = field(default_factory=BestPolicy)

    def is_due(self, step: int) -> bool:
        """Returns whether a checkpoint is due at this step, the same on every rank."""
        return self.every_steps is not None and step % self.every_steps == 0


@dataclass(frozen=True)
class ResumePolicy:
    """Configures how a run resumes.

    Attributes:
        on_corrupt: what to do if the newest checkpoint is damaged. "error" raises; "fallback" resumes from the newest
            intact checkpoint and deletes the damaged ones after it.
        load: permitted differences between the checkpoint and the run.
    """

    on_corrupt: Literal["error", "fallback"] = "error"
    load: LoadOptions = field(default_factory=LoadOptions)


class Checkpoints:
    """Saves and restores the tables, the optimizers and the counters of a run.

    Collective: every rank constructs one.

    Args:
        path: folder of the checkpoints.
        task: the tables and dense parameters to save, with their optimizers.
        state: the run's counters.
        facts: JSON to save with each checkpoint, such as the configuration and the fingerprint of the data.
        policy: when and how to save.
        resume: how to resume.
        ranks: the ranks of the run.

    Attributes:
        metrics: the latest value of each measure, saved with each checkpoint.
        measured_at: by measure, the step of its latest value.

    Raises:
        UserError: the facts do not match `RunState`; raised on every rank.
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
        # A run cannot resume from a checkpoint with invalid facts, so check them before training.
        ranks.run_on_each(self._check_facts)

    @property
    def has_failed(self) -> bool:
        """Whether this rank knows that a background save has failed; then all ranks must call `settle`."""
        return self._saver.has_failed

    def take_metrics(self, record: Mapping[str, Any]) -> None:
        """Adds the values of a record to the metrics that later checkpoints hold."""
        self.metrics = {**self.metrics, **record}
        self.measured_at = {**self.measured_at, **dict.fromkeys(record, self._state.step)}

    @property
    def complete_step(self) -> int | None:
        """The step of the newest checkpoint that this rank knows to be complete; None if there is none."""
        return self._saver.complete_step

    def is_overdue(self) -> bool:
        """Returns whether `every_seconds` have passed on this rank since the last save."""
        every = self.policy.every_seconds
        return every is not None and time.monotonic() - self._saved_at_seconds >= every

    def save(self, *, is_last: bool = False) -> None:
        """Saves the run; no-op if it was saved at this step already. Collective: every rank.

        Args:
            is_last: whether the checkpoint must be durable on return, as at the end of the run.

        Raises:
            CheckpointError: the last save of a run failed, or more consecutive saves failed than
                `SaveOptions.max_failures` tolerates; raised on every rank.
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
        """Returns the JSON state of a checkpoint, which `RunState` declares."""
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
            raise UserError(f"a checkpoint cannot hold the facts of this run (see Parts.facts): {error}") from error

    def settle(self) -> None:
        """Waits for a background save and raises its error, unless failures are still tolerated.

        Collective: every rank.
        """
        self._saver.settle()

    def restore(self) -> bool:
        """Loads the newest complete checkpoint; returns False if there is none. Collective: every rank.

        Raises:
            UserError: the checkpoint was made with another optimizer or from other data.
            CorruptCheckpointError: the checkpoint is damaged, and `on_corrupt` is "error" or no older one is intact.
            CheckpointError: the tensors of the checkpoint do not match the tables.
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
        # Training will reach their steps again, and a complete checkpoint is never overwritten.
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
            # Checkpoints of earlier versions hold the step counts here only. All other settings come from the
            # configuration, which the caller has compared with the saved one.
            for settings, group in zip(self._optimizer.param_groups, groups, strict=True):
                settings["step"] = group["step"]


def load_weights(path: str, tables: EmbeddingCollection, dense: DenseOptimizer | None, data_fingerprint: str) -> int:
    """Loads the tables and dense parameters of a checkpoint for inference, without optimizer states.

    Collective: every rank.

    Args:
        path: path of the checkpoint.
        tables: tables to load.
        dense: optimizer of the dense parameters to load; None if the model has none.
        data_fingerprint: fingerprint of the data that the model is used with.

    Returns:
        The step of the checkpoint.

    Raises:
        UserError: the checkpoint was trained on other data.
        CheckpointError: the tensors do not match the tables, or the checkpoint is damaged or was deleted during
            loading.
    """
    views = tables.shard_views()

    def load() -> int:
        with CheckpointReader(path) as reader:
            if read_run_state(reader.manifest, path).data_fingerprint != data_fingerprint:
                raise UserError(
                    f"{path} was trained on data that differ from the run's present data: the rows of its tables do "
                    "not belong to the present data"
                )
            load_shards(reader, views, LoadOptions(optimizer_state="reset"))
            if dense is not None:
                dense.load_tensors(reader.replicated(), with_state=False)
            return reader.step

    # If one rank fails, all must fail; otherwise the others would wait for it in the next collective.
    return tables.ranks.run_on_each(load)


def _corruption(error: Exception | None) -> str | None:
    return str(error) if isinstance(error, CorruptCheckpointError) else None


def _remove(paths: list[str]) -> None:
    for path in paths:
        remove_checkpoint(path)


def _is_json(value: Any) -> bool:
    return isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
