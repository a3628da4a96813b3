"""Optimizers and evaluations from their sections."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
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
    del settings["name"]  # there is one optimizer so far, and the configuration's type says so
    try:
        return optim.RowwiseAdagrad(tables, **settings)
    except ValueError as error:
        raise UserError(f"optimizer: {error}") from error


def build_dense_optimizer(
    section: DenseOptimizerConfig, module: nn.Module, group: dist.ProcessGroup | None
) -> DenseOptimizer:
    """Returns the optimizer of a model's dense part. Collective: every rank.

    Raises:
        UserError: a hyperparameter is out of range.
    """
    try:
        return DenseOptimizer(module, process_group=group, **vars(section))
    except ValueError as error:
        raise UserError(f"dense_optimizer: {error}") from error
