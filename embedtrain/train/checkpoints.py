"""When a run saves, what it saves, and how it comes back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from embedtrain.checkpoint import (
    CheckpointReader,
    agree_on_latest,
    load_shards,
    retain,
    save_checkpoint,
    sweep_leftovers,
)
from embedtrain.distributed.collectives import raise_together
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import UserError
from embedtrain.optim.sparse import SparseOptimizer
from embedtrain.train.state import TrainState


@dataclass(frozen=True)
class SavePolicy:
    """When to save beside the end of the run.

    Attributes:
        every_steps: steps between two checkpoints; None leaves it to the clock.
        every_seconds: seconds between two checkpoints, by rank 0's clock; None leaves it to the steps.
        keep_last: how many of the newest checkpoints stay; None keeps all.
    """

    every_steps: int | None = None
    every_seconds: float | None = 600.0
    keep_last: int | None = 3

    def is_due(self, step: int) -> bool:
        """Returns whether the count of steps asks for a checkpoint; alike on every rank."""
        return self.every_steps is not None and step % self.every_steps == 0


class Checkpoints:
    """Saves and restores tables, optimizer and counters of a run.

    Args:
        path: folder of the checkpoints.
        tables: rows and their optimizer state.
        optimizer: its step counts and hyperparameters.
        state: the run's counters.
        facts: what else belongs in each checkpoint, as JSON: the configuration, the data's fingerprint.
        policy: when to save.
        group: the ranks of the run.
    """

    def __init__(
        self,
        path: str,
        tables: EmbeddingCollection,
        optimizer: SparseOptimizer,
        state: TrainState,
        *,
        facts: Mapping[str, Any],
        policy: SavePolicy,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.policy = policy
        self._path = path
        self._tables = tables
        self._optimizer = optimizer
        self._state = state
        self._facts = facts
        self._group = group
        self._saved_step: int | None = None
        self._saved_at_seconds = time.monotonic()

    def is_overdue(self) -> bool:
        """Returns whether this rank's clock asks for a checkpoint."""
        every = self.policy.every_seconds
        return every is not None and time.monotonic() - self._saved_at_seconds >= every

    def save(self) -> None:
        """Saves the run as it stands, unless it was saved at this very step. Collective: every rank."""
        if self._saved_step == self._state.step:
            return
        saved = {
            **self._facts,
            "train": self._state.as_json(),
            "optimizer": {
                "name": type(self._optimizer).__name__,
                "param_groups": self._optimizer.state_dict()["param_groups"],
                "num_skipped": self._optimizer.num_skipped,
            },
        }
        save_checkpoint(self._path, self._state.step, self._tables.shard_views(), saved, self._group)
        retain(self._path, self.policy.keep_last, self._group)
        self._saved_step, self._saved_at_seconds = self._state.step, time.monotonic()

    def restore(self) -> bool:
        """Takes over the newest complete checkpoint, if there is one. Collective: every rank.

        Raises:
            UserError: the checkpoint was made with another optimizer or from other data.
            CheckpointError: its tensors are not those of the tables.
        """
        latest = agree_on_latest(self._path, self._group)
        if latest is None:
            return False
        error: Exception | None = None
        try:
            with CheckpointReader(latest) as reader:
                self._take_over(reader, latest)
        except Exception as raised:
            error = raised
        raise_together(error, self._group)
        sweep_leftovers(self._path, self._group)
        self._saved_step = self._state.step
        return True

    def _take_over(self, reader: CheckpointReader, path: str) -> None:
        saved = reader.state
        expected = type(self._optimizer).__name__
        if saved["optimizer"]["name"] != expected:
            raise UserError(
                f"{path} holds the state of {saved['optimizer']['name']}, and this run's optimizer is {expected}"
            )
        if saved["data_fingerprint"] != self._facts["data_fingerprint"]:
            raise UserError(
                f"{path} was trained on other data than data.path holds now: start a new run.path, or bring back "
                "the text, the vocabulary options and the tokenizer that the run began with"
            )
        load_shards(reader, self._tables.shard_views())
        self._state.restore(saved["train"])
        self._optimizer.num_skipped = saved["optimizer"]["num_skipped"]
        for settings, was in zip(self._optimizer.param_groups, saved["optimizer"]["param_groups"], strict=True):
            # The rest is this run's configuration, which the caller has compared with the saved one.
            settings["step"] = was["step"]
