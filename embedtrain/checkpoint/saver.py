"""Saving a run's checkpoints: in the background, full or as deltas, tolerating some failures."""

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
    """Says how a run saves its checkpoints.

    Attributes:
        mode: "async" writes in a background thread while training continues; "sync" blocks training until the
            checkpoint is written. Saves to a remote file system are always "sync".
        max_extra_memory_bytes: per rank, the maximum memory for copies of rows that training changes during a
            background save. If it is exceeded, training waits until all rows are read. None for no limit.
        max_failures: number of consecutive failed saves that only log a warning; one more fails the run.
        full_every: every `full_every`-th save is full; the others hold only the rows changed since the previous save.
        retention: which checkpoints are kept.
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
        ranks: the ranks of the run.
        background_ranks: the same ranks in a group of their own for the background thread; None to save in the
            foreground.
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
        # A retried write to a remote store reads the rows a second time, when training may have changed them.
        is_written_once = storage.local_path(checkpoints_path) is not None
        self._is_async = options.mode == "async" and is_written_once and background_ranks is not None
        self._task: _Task | None = None
        self._parent: Parent | None = None
        self._num_deltas = 0
        self._num_failures = 0
        self._has_warned_of_memory = False
        self.step: int | None = None
        """Step of the last save that succeeded or is running; None if the last save failed."""
        self._complete_step: int | None = None

    @property
    def has_failed(self) -> bool:
        """Returns whether the background save failed on this rank; `settle` reports it on every rank."""
        return self._task is not None and self._task.error is not None

    @property
    def complete_step(self) -> int | None:
        """Returns the step of the newest checkpoint that this rank knows to be complete, or None."""
        saved = None if self._task is None else self._task.saved
        return self._complete_step if saved is None else saved.identity.step

    def take_over(self, step: int) -> None:
        """Records the step of the complete checkpoint that the run was restored from."""
        self.step = self._complete_step = step

    @property
    def is_idle(self) -> bool:
        """Returns whether no background save is running on this rank."""
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
        """Saves a checkpoint, or starts a background save; first waits for the previous save.

        Collective: every rank. After a background save has started, only rows of shards with `changes` may be
        updated, by an optimizer that reports its updates. Everything else must stay unchanged until `settle`.

        Args:
            step: see `save_checkpoint`.
            shards: see `save_checkpoint`.
            state: see `save_checkpoint`.
            replicated: see `save_checkpoint`.
            is_last: save in the foreground, and raise on any failure.

        Raises:
            CheckpointError: on every rank; more than `max_failures` consecutive saves failed, or a last one failed.
            UserError: on every rank; checkpoints cannot be saved to this path.
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
        """Waits until the background save, if any, is durable or has failed.

        Collective: every rank.

        Raises:
            CheckpointError: on every rank; more than `max_failures` consecutive saves failed.
            UserError: on every rank; checkpoints cannot be saved to this path.
        """
        task, self._task = self._task, None
        if task is None:
            return
        task.join()
        outcomes = on_every_rank("cannot save in the background", task.outcome, self._ranks)
        if any(exceeded for _, _, exceeded in outcomes) and not self._has_warned_of_memory:
            self._has_warned_of_memory = True
            _logger.warning(
                "training waited for a background save because copies of changed rows exceeded "
                f"checkpoint.max_extra_memory_bytes={self._options.max_extra_memory_bytes:,}: raise it to avoid this"
            )
        errors = [error for _, error, _ in outcomes if error is not None]
        saved = outcomes[0][0]
        if errors or saved is None:
            is_user_error, text = errors[0] if errors else (False, "the background save did not end")
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
        # The rows changed since the last successful save are no longer known, so the next save is full.
        self._parent, self._num_deltas, self.step = None, 0, None
        self._num_failures += 1
        if is_user_error:
            raise UserError(text) from error
        if self._num_failures > max_failures:
            raise CheckpointError(f"{text} (consecutive failed saves: {self._num_failures})") from error
        _logger.warning(
            f"{text}; training continues after {self._num_failures} consecutive failed saves "
            f"(checkpoint.max_failures={self._options.max_failures})"
        )


class _Task(threading.Thread):
    """Runs one background save.

    Attributes:
        error: the exception, once the save has failed.
        saved: the checkpoint, once it is complete.
    """

    def __init__(self, write: Callable[[], SavedCheckpoint], staged: StagedParts, budget: MemoryBudget) -> None:
        # A daemon thread: if the run fails, a save that waits for dead ranks must not keep the process alive.
        super().__init__(name="embedtrain-checkpoint", daemon=True)
        self.error: BaseException | None = None
        self._write = write
        self._staged = staged
        self._budget = budget
        self.saved: SavedCheckpoint | None = None

    def run(self) -> None:
        """Writes the checkpoint and records the result or the error."""
        try:
            self.saved = self._write()
        except BaseException as error:
            self.error = error
        finally:
            self._staged.release()

    def outcome(self) -> tuple[SavedCheckpoint | None, tuple[bool, str] | None, bool]:
        """Returns the checkpoint, the error as (is UserError, text), and whether the memory budget was exceeded."""
        known = isinstance(self.error, CheckpointError | UserError)
        text = str(self.error) if known else f"the save failed: {type(self.error).__name__}: {self.error}"
        error = None if self.error is None else (isinstance(self.error, UserError), text)
        return self.saved, error, self._budget.is_exceeded
