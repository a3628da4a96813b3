"""One training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from embedtrain.distributed.stages import stage
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.optim.optimizer import SparseOptimizer
from embedtrain.train.task import Model, Objective


def train_step(
    model: Model,
    optimizer: SparseOptimizer,
    batch: Any,
    dense: DenseOptimizer | None = None,
    dense_factor: float = 1.0,
    meanwhile: Callable[[], None] | None = None,
) -> Objective:
    """Trains on this rank's batch and returns its objective.

    Collective: every rank; a batch may be empty.

    Args:
        model: takes the batch.
        optimizer: of the tables, at the rates of its parameter groups.
        batch: this rank's.
        dense: the optimizer of the other parameters, which are updated where the tables are; None without any.
        dense_factor: factor of its learning rate.
        meanwhile: called once the device has work, which on a GPU is long before it is done: forward and backward, or
            the whole step.

    Raises:
        NonFiniteError: the loss or a gradient is not finite on any rank; see `SparseOptimizer`.
    """
    with stage("forward"):
        objective = model(batch)
    with stage("backward"):
        objective.loss.backward()
    # Several ranks wait for each other's sizes meanwhile: the device then has the update to do. One rank waits for
    # nothing, and has what it prepared known to the host by the wait for the step before.
    is_before = not optimizer.looks_later or optimizer.stores[0].ranks.size == 1
    if meanwhile is not None and is_before:
        optimizer.settle()
        meanwhile()
    if dense is not None:
        averaged = dense.average_gradients()
        optimizer.watch(averaged.values, averaged.fault)
    optimizer.watch(objective.total)
    with stage("update"):
        num_skipped = optimizer.num_skipped
        optimizer.step()
        optimizer.zero_grad()
        if dense is not None:
            if optimizer.looks_later:
                dense.step(dense_factor, optimizer.found_inf)
            elif optimizer.num_skipped == num_skipped:
                dense.step(dense_factor)
            dense.zero_grad()
    if meanwhile is not None and not is_before:
        meanwhile()
    return objective
