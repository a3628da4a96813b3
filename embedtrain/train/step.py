"""One training step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from embedtrain.models.objective import Objective
from embedtrain.optim.sparse import SparseOptimizer
from embedtrain.stages import stage

Model = Callable[[Any], Objective]


def train_step(model: Model, optimizer: SparseOptimizer, batch: Any, lr: float) -> Objective:
    """Trains on this rank's batch and returns its objective.

    Collective: every rank; a batch may be empty.

    Raises:
        NonFiniteError: the loss or a gradient is not finite on any rank; see `SparseOptimizer`.
    """
    for settings in optimizer.param_groups:
        settings["lr"] = lr
    with stage("forward"):
        objective = model(batch)
    with stage("backward"):
        objective.loss.backward()
    total = float(objective.total)
    if not math.isfinite(total):
        optimizer.veto(f"the loss is {total}")
    with stage("update"):
        optimizer.step()
        optimizer.zero_grad()
    return objective
