"""`CheckpointSaver`: a run's saves one after another, in the background, as deltas, and some of them failing."""

from __future__ import annotations

import copy
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from embedtrain import storage
from embedtrain.checkpoint.agreement import on_every_rank
from embedtrain.checkpoint.manifest import Parent
from embedtrain.checkpoint.parts import StagedParts
from embedtrain.checkpoint.retention import Retention, retain
from embedtrain.checkpoint.writer import Contents, SavedCheckpoint, write_checkpoint
from embedtrain.distributed.ranks import Ranks
from embedtrain.embedding.row_changes import MemoryBudget
from embedtrain.embedding.shard_view import ShardView, table_steps
from embedtrain.errors import CheckpointError, UserError

_logger = logging.getLogger(__name__)

DEFAULT_EXTRA_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class SaveOptions:
    """How a run saves.

    Attributes:
        mode: "async" writes in a background thread while training goes on; "sync" writes before it goes on, as does
            every save to a file system that is not local.
        max_extra_memory_bytes: bound on each rank's copies of rows that training changes during a save in the
            background; where it does not suffice, training waits until all rows were read. None for no bound.
        max_failures: failed saves in a row that are only warned of; one more fails the run.
        full_every: every `full_every`-th save is full; the others hold only rows that changed since the save before.
        retention: which checkpoints stay.
    """

    mode: Literal["async", "sync"] = "async"
    max_extra_memory_bytes: int | None = DEFAULT_EXTRA_MEMORY_BYTES
    max_failures: int = 3
    full_every: int = 1
    retention: Retention = field(default_factory=Retention)


class CheckpointSaver:
    """Saves a run's checkpoints, one at a time.

    Args:
        checkpoints_path: folder of the run's checkpoints.
        ranks: those of the run.
        background_ranks: the same ranks, for the background thread alone; None to save
            in the foreground.
        options: how to save.
    """

    def __init__(
        self,
        checkpoints_path: str,
        ranks: Ranks,
        background_ranks: Ranks | None,
        options: SaveOptions,
    ) -> None:
        self._path = checkpoints_path
        self._ranks = ranks
        self._background_ranks = background_ranks or ranks
        self._options = options
        # A write to a remote store may be tried again, and reads the rows again: by then training has changed them.
        is_written_once = storage.local_path(checkpoints_path) is not None
        self._is_async = options.mode == "async" and is_written_once and background_ranks is not None
        self._task: _Task | None = None
        self._parent: Parent | None = None
        self._num_deltas = 0
        self._num_failures = 0
        self._has_warned_of_memory = False
        self.step: int | None = None
        """The step of the last save that succeeded or is under way; None where the last one failed."""
        self._complete_step: int | None = None

    @property
    def has_failed(self) -> bool:
        """Returns whether the save in the background failed on this rank; `settle` says so on every rank."""
        return self._task is not None and self._task.error is not None

    @property
    def complete_step(self) -> int | None:
        """Returns the step of the newest checkpoint that this rank knows to be complete; None if there is none."""
        saved = None if self._task is None else self._task.saved
        return self._complete_step if saved is None else saved.identity.step

    def take_over(self, step: int) -> None:
        """Takes note of the complete checkpoint that the run was restored from."""
        self.step = self._complete_step = step

    @property
    def is_idle(self) -> bool:
        """Returns whether this rank has nothing left to write."""
        return self._task is None or not self._task.is_alive()

    def save(
        self,
        step: int,
        shards: Sequence[ShardView],
        state: Mapping[str, Any],
        replicated: Mapping[str, Tensor] | None = None,
        *,
        is_last: bool = False,
    ) -> None:
        """Saves, or begins to save in the background; waits for the save before it.

        Collective: every rank. Rows of shards with `changes` may be updated on return through an optimizer
        that reports its updates; nothing else of theirs may change until the save was settled.

        Args:
            step: as in `save_checkpoint`.
            shards: as in `save_checkpoint`.
            state: as in `save_checkpoint`.
            replicated: as in `save_checkpoint`.
            is_last: whether the checkpoint must be durable on return, and a failure is not tolerated.

        Raises:
            CheckpointError: on every rank alike; more saves in a row failed than are tolerated, or the last.
            UserError: likewise; the path cannot be one of checkpoints.
        """
        self.settle()
        is_delta = self._parent is not None and self._num_deltas + 1 < self._options.full_every
        if self._options.full_every > 1:
            for view in shards:
                if view.changes is not None:
                    view.changes.track()
        is_background = self._is_async and not is_last
        budget = MemoryBudget(self._options.max_extra_memory_bytes) if is_background else None
        staged = StagedParts(shards, is_delta=is_delta, budget=budget)
        parent = self._parent if is_delta else None
        contents = Contents(step, staged.parts, state, replicated or {}, parent, table_steps(shards))
        self.step = step
        if budget is None:
            self._save_now(contents, 0 if is_last else self._options.max_failures)
            return
        tensors = {name: tensor.detach().clone() for name, tensor in contents.replicated.items()}
        contents = replace(contents, state=copy.deepcopy(dict(state)), replicated=tensors)
        self._task = _Task(functools.partial(self._write, contents, self._background_ranks), staged, budget)
        self._task.start()

    def settle(self) -> None:
        """Waits for the save in the background, if there is one, until it is durable or has failed.

        Collective: every rank.

        Raises:
            CheckpointError: on every rank alike; it failed, and so many before it that the run fails.
            UserError: likewise; the path cannot be one of checkpoints.
        """
        task, self._task = self._task, None
        if task is None:
            return
        task.join()
        outcomes = on_every_rank("saving in the background", task.outcome, self._ranks)
        if any(exceeded for _, _, exceeded in outcomes) and not self._has_warned_of_memory:
            self._has_warned_of_memory = True
            _logger.warning(
                f"checkpoint.max_extra_memory_bytes={self._options.max_extra_memory_bytes:,} did not suffice for the "
                "rows that changed during a save: training waited until all rows were read, and will again"
            )
        errors = [error for _, error, _ in outcomes if error is not None]
        saved = outcomes[0][0]
        if errors or saved is None:
            is_user_error, text = errors[0] if errors else (False, "it did not end")
            self._count_failure(is_user_error, text, task.error, self._options.max_failures)
        else:
            self._count_success(saved)

    def _save_now(self, contents: Contents, max_failures: int) -> None:
        try:
            saved = self._write(contents, self._ranks)
        except (CheckpointError, UserError) as error:
            self._count_failure(isinstance(error, UserError), str(error), error, max_failures)
        else:
            self._count_success(saved)

    def _write(self, contents: Contents, ranks: Ranks) -> SavedCheckpoint:
        saved = write_checkpoint(self._path, contents, ranks)
        try:
            retain(self._path, self._options.retention, ranks)
        except CheckpointError as error:
            if ranks.rank == 0:
                _logger.warning(f"{error}; the checkpoint of step {contents.step} was saved")
        return saved

    def _count_success(self, saved: SavedCheckpoint) -> None:
        is_delta = self._parent is not None and self._num_deltas + 1 < self._options.full_every
        self._num_deltas = self._num_deltas + 1 if is_delta else 0
        self._parent = saved.identity
        self._complete_step = saved.identity.step
        self._num_failures = 0

    def _count_failure(self, is_user_error: bool, text: str, error: BaseException | None, max_failures: int) -> None:
        # The rows touched since the last save that succeeded are not known any longer: the next one is full.
        self._parent, self._num_deltas, self.step = None, 0, None
        self._num_failures += 1
        if is_user_error:
            raise UserError(text) from error
        if self._num_failures > max_failures:
            raise CheckpointError(f"{text} (failed saves in a row: {self._num_failures})") from error
        _logger.warning(
            f"{text}; training goes on: failed saves in a row {self._num_failures}, "
            f"of at most {self._options.max_failures} (checkpoint.max_failures)"
        )


class _Task(threading.Thread):
    """A save in the background.

    Attributes:
        error: what it failed with, as soon as it has.
        saved: the checkpoint, as soon as it is complete.
    """

    def __init__(self, write: Callable[[], SavedCheckpoint], staged: StagedParts, budget: MemoryBudget) -> None:
        # A daemon: where the run fails, a save that waits for ranks that are gone does not hold the process.
        super().__init__(name="embedtrain-checkpoint", daemon=True)
        self.error: BaseException | None = None
        self._write = write
        self._staged = staged
        self._budget = budget
        self.saved: SavedCheckpoint | None = None

    def run(self) -> None:
        """Writes, and keeps the outcome."""
        try:
            self.saved = self._write()
        except BaseException as error:
            self.error = error
        finally:
            self._staged.release()

    def outcome(self) -> tuple[SavedCheckpoint | None, tuple[bool, str] | None, bool]:
        """Returns what was saved, the error as whether it is the user's and its text, and whether memory ran out."""
        known = isinstance(self.error, CheckpointError | UserError)
        text = str(self.error) if known else f"saving failed: {type(self.error).__name__}: {self.error}"
        error = None if self.error is None else (isinstance(self.error, UserError), text)
        return self.saved, error, self._budget.is_exceeded
