"""The optimizers' sections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class OptimizerConfig:
    """Row-wise Adagrad of the tables; see `embedtrain.optim.RowwiseAdagrad`."""

    name: Literal["rowwise_adagrad"] = "rowwise_adagrad"
    lr: float = 0.6
    eps: float = 1e-10
    initial_accumulator_value: float = 100.0
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    max_grad_norm: float | None = None
    nonfinite: Literal["error", "skip"] = "error"


@dataclass
class DenseOptimizerConfig:
    """torch's optimizer of the parameters that are not rows of tables."""

    name: Literal["adam", "adamw", "adagrad", "sgd"] = "adam"
    lr: float = 1e-3
    """Falls with the same schedule as the tables'."""
    weight_decay: float = 0.0
