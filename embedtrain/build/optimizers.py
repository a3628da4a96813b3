"""Optimizers and evaluations from their sections."""

from __future__ import annotations

from typing import Any

from torch import nn

from embedtrain import optim
from embedtrain.config.optimizer import DenseOptimizerConfig, OptimizerConfig
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import UserError
from embedtrain.optim.dense import DenseOptimizer


def build_optimizer(section: OptimizerConfig, tables: EmbeddingCollection) -> optim.SparseOptimizer:
    """Returns the optimizer of the tables.

    Raises:
        UserError: a hyperparameter is out of range.
    """
    settings: dict[str, Any] = dict(vars(section))
    # The loop resets the state; all else is the optimizer's own.
    for name in ("name", "reset_state_from_step"):
        del settings[name]
    try:
        return optim.OPTIMIZERS[section.name](tables, **settings)
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from error


def build_dense_optimizer(
    section: DenseOptimizerConfig, module: nn.Module, tables: EmbeddingCollection
) -> DenseOptimizer:
    """Returns the optimizer of a model's dense part, on the ranks of its tables. Collective: every rank.

    Raises:
        UserError: a hyperparameter is out of range.
    """
    try:
        return DenseOptimizer(module, process_group=tables.process_group, shared=tables.shared, **vars(section))
    except ValueError as error:
        raise UserError(f"dense_optimizer: {error}") from error
