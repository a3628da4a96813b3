"""Choice of a run's checkpoint: the newest, the one of a given step, or the best by the run's metric."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from embedtrain.checkpoint.chain import read_manifest
from embedtrain.checkpoint.manifest import MANIFEST_NAME
from embedtrain.checkpoint.retention import CheckpointInfo, Retention, find_checkpoints, mode_of_best, num_best
from embedtrain.errors import CorruptCheckpointError, UserError
from embedtrain.schema import SchemaError, parse

Step = int | Literal["best", "newest"] | None
"""A step, "best", "newest", or None: the best checkpoint if the run keeps its best ones, otherwise the newest."""

_logger = logging.getLogger(__name__)


def choose_checkpoint(checkpoints_path: str, step: Step, run_path: str) -> str:
    """Returns the path of the chosen complete checkpoint and logs the choice.

    Args:
        checkpoints_path: folder of the run's checkpoints.
        step: see `Step`; "best" uses the run's `checkpoint.best_metric` and `checkpoint.best_mode`.
        run_path: the run's folder as the user named it, for messages.

    Raises:
        UserError: the run has no complete checkpoint, none of this step, or none with the metric.
    """
    found = find_checkpoints(checkpoints_path)
    if not found:
        raise UserError(f"{run_path!r} has no complete checkpoint yet: train until the first one is saved")
    if isinstance(step, int):
        return _of_step(found, step, run_path)
    newest = found[-1]
    if step == "best" or (step is None and _read_state(newest.path).config.keeps_best):
        best = _best(found, run_path)
        if best is not None:
            return best
        if step == "best":
            metric = _read_state(newest.path).config.checkpoint.best_metric
            raise UserError(
                f"no checkpoint in {run_path!r} has the metric checkpoint.best_metric={metric}, so the best one is "
                "unknown: name a step with --step N"
            )
    _logger.info(f"{run_path}: using the newest checkpoint, step {newest.step:,}")
    return newest.path


def _of_step(found: Sequence[CheckpointInfo], step: int, run_path: str) -> str:
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint.path
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise UserError(f"{run_path!r} has no complete checkpoint of step {step}; it has checkpoints of steps {steps}")


@dataclass(frozen=True)
class _Settings:
    """Holds the settings of a run that choose its best checkpoint."""

    keep_best: int | None = None
    best_metric: str = Retention.best_metric
    best_mode: Literal["auto", "min", "max"] = Retention.best_mode


@dataclass(frozen=True)
class _EarlyStop:
    patience: int | None = None


@dataclass(frozen=True)
class _Train:
    early_stop: _EarlyStop = field(default_factory=_EarlyStop)


@dataclass(frozen=True)
class _Config:
    checkpoint: _Settings = field(default_factory=_Settings)
    train: _Train = field(default_factory=_Train)

    @property
    def keeps_best(self) -> bool:
        return num_best(self.checkpoint.keep_best, self.train.early_stop.patience) is not None


@dataclass(frozen=True)
class _State:
    """Holds the parts of a checkpoint's state that the choice needs."""

    config: _Config = field(default_factory=_Config)
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)


def _read_state(path: str) -> _State:
    try:
        return parse(_State, dict(read_manifest(path).state))
    except SchemaError as error:
        raise CorruptCheckpointError(f"{path}: the state in {MANIFEST_NAME}: {error}") from error


def _best(found: Sequence[CheckpointInfo], run_path: str) -> str | None:
    """Returns the path of the best checkpoint and logs the choice; None if no checkpoint has the metric."""
    states = [_read_state(checkpoint.path) for checkpoint in found]
    settings = states[-1].config.checkpoint
    metric, mode = settings.best_metric, mode_of_best(settings.best_metric, settings.best_mode)
    measured = [
        (value if mode == "min" else -value, checkpoint.step, checkpoint.path)
        for state, checkpoint in zip(states, found, strict=True)
        if isinstance(value := state.metrics.get(metric), int | float)
    ]
    if not measured:
        return None
    value, step, path = min(measured)
    _logger.info(
        f"{run_path}: using the best checkpoint, step {step:,} ({metric} {value if mode == 'min' else -value:.6g})"
    )
    return path
