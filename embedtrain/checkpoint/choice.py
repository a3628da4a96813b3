"""Which checkpoint of a run is meant: the newest, the one of a step, or the best by the run's metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from embedtrain.checkpoint.chain import read_manifest
from embedtrain.checkpoint.manifest import MANIFEST_NAME
from embedtrain.checkpoint.retention import CheckpointInfo, Retention, find_checkpoints, mode_of_best
from embedtrain.errors import CorruptCheckpointError, UserError
from embedtrain.schema import SchemaError, parse

Step = int | Literal["best"] | None
"""A step, "best", or None for the newest checkpoint."""


def choose_checkpoint(checkpoints_path: str, step: Step, run_path: str) -> str:
    """Returns the path of a complete checkpoint.

    Args:
        checkpoints_path: folder of the run's checkpoints.
        step: which one; "best" goes by `checkpoint.best_metric` and `checkpoint.best_mode` of the run.
        run_path: what the user called the run, for messages.

    Raises:
        UserError: there is none, or none of this step, or none has the metric.
    """
    found = find_checkpoints(checkpoints_path)
    if not found:
        raise UserError(f"no complete checkpoint yet in {run_path!r}; train until the first one is saved")
    if step is None:
        return found[-1].path
    if step == "best":
        return _best(found, run_path)
    for checkpoint in found:
        if checkpoint.step == step:
            return checkpoint.path
    steps = ", ".join(str(checkpoint.step) for checkpoint in found)
    raise UserError(f"{run_path!r} has no complete checkpoint of step {step}; it has those of {steps}")


@dataclass(frozen=True)
class _Settings:
    """What a run's configuration says of its best checkpoint."""

    best_metric: str = Retention.best_metric
    best_mode: Literal["auto", "min", "max"] = "auto"


@dataclass(frozen=True)
class _Config:
    checkpoint: _Settings = field(default_factory=_Settings)


@dataclass(frozen=True)
class _State:
    """What of a checkpoint's state the choice goes by."""

    config: _Config = field(default_factory=_Config)
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)


def _read_state(path: str) -> _State:
    try:
        return parse(_State, dict(read_manifest(path).state))
    except SchemaError as error:
        raise CorruptCheckpointError(f"{path}: the state in {MANIFEST_NAME}: {error}") from error


def _best(found: Sequence[CheckpointInfo], run_path: str) -> str:
    states = [_read_state(checkpoint.path) for checkpoint in found]
    settings = states[-1].config.checkpoint
    metric, mode = settings.best_metric, mode_of_best(settings.best_metric, settings.best_mode)
    measured = [
        (value if mode == "min" else -value, checkpoint.step, checkpoint.path)
        for state, checkpoint in zip(states, found, strict=True)
        if isinstance(value := state.metrics.get(metric), int | float)
    ]
    if not measured:
        raise UserError(
            f"no checkpoint in {run_path!r} has the metric {metric!r}, by which the best is chosen "
            "(checkpoint.best_metric): give a step by --step N"
        )
    return min(measured)[2]
