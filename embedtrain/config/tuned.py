"""The settings by which runs are told apart: what somebody tuned, without paths and the machinery."""

from __future__ import annotations

from typing import Any

from embedtrain.config.sections import Config
from embedtrain.config.values import flatten, settings_of

_ALWAYS = ("model", "optimizer.name", "optimizer.lr", "table.dim", "train.epochs", "train.global_batch_size", "seed")
"""Settings that stand beside every run, changed or not: most comparisons are of them."""
_LEFT_OUT = ("data.", "run.", "log.", "checkpoint.", "resume.", "publish.", "evaluate.")


def tuned_settings(config: Config) -> dict[str, Any]:
    """Returns the settings by their full keys that were changed from their defaults, and those that runs always show.

    Paths, and the settings of data files, logs, checkpoints, evaluation and publication are left out.
    """
    defaults = dict(flatten(settings_of(type(config)())))
    return {
        key: value
        for key, value in flatten(settings_of(config))
        if key in _ALWAYS
        or (value != defaults.get(key) and not key.startswith(_LEFT_OUT) and "path" not in key.rpartition(".")[2])
    }
