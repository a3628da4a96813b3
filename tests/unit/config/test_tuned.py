from __future__ import annotations

from embedtrain.config.sections import Config
from embedtrain.config.tuned import tuned_settings


def test_runs_are_told_apart_by_what_was_tuned() -> None:
    config = Config(model="x")
    usual = tuned_settings(config)
    assert {"optimizer.name", "optimizer.lr", "table.dim", "train.epochs", "seed"} <= set(usual)
    config.run.path = "runs/y"
    config.log.every_steps = 3
    config.checkpoint.keep_last = 7
    assert tuned_settings(config) == usual
    config.table.dtype = "bfloat16"
    config.table.dim = 77
    assert tuned_settings(config) == {**usual, "table.dtype": "bfloat16", "table.dim": 77}
