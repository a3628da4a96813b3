"""One training step."""

from __future__ import annotations

import math
from typing import Any

from embedtrain.models.objective import Objective
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.optim.sparse import SparseOptimizer
from embedtrain.stages import stage
from embedtrain.train.task import Model


def train_step(
    model: Model,
    optimizer: SparseOptimizer,
    batch: Any,
    dense: DenseOptimizer | None = None,
    dense_factor: float = 1.0,
) -> Objective:
    """Trains on this rank's batch and returns its objective.

    Collective: every rank; a batch may be empty.

    Args:
        model: takes the batch.
        optimizer: of the tables, at the rates of its parameter groups.
        batch: this rank's.
        dense: the optimizer of the other parameters, which are updated where the tables are; None without any.
        dense_factor: factor of its learning rate.

    Raises:
        NonFiniteError: the loss or a gradient is not finite on any rank; see `SparseOptimizer`.
    """
    with stage("forward"):
        objective = model(batch)
    with stage("backward"):
        objective.loss.backward()
    total = float(objective.total)
    if not math.isfinite(total):
        optimizer.veto(f"the loss is {total}")
    if dense is not None and (fault := dense.average_gradients()) is not None:
        optimizer.veto(fault)
    with stage("update"):
        num_skipped = optimizer.num_skipped
        optimizer.step()
        optimizer.zero_grad()
        if dense is not None:
            if optimizer.num_skipped == num_skipped:
                dense.step(dense_factor)
            dense.zero_grad()
    return objective
