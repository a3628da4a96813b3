"""Sparse optimizers, which update the rows that a step touched and no others."""

from typing import Any

from embedtrain.ops.damp_rows import Damping
from embedtrain.optim.combined import Combined
from embedtrain.optim.damping import CurvatureDamping
from embedtrain.optim.formulas import SGD, Adagrad, Adam, RMSprop, RowwiseAdagrad, RowwiseAdam
from embedtrain.optim.optimizer import CommonOptions, SparseOptimizer
from embedtrain.optim.preconditioning import Preconditioner, Touched
from embedtrain.optim.registry import Registry
from embedtrain.optim.stores import RowState


def _check(found: Any) -> type[SparseOptimizer]:
    if not (isinstance(found, type) and issubclass(found, SparseOptimizer)):
        raise TypeError("a subclass of embedtrain.optim.SparseOptimizer")
    return found


OPTIMIZERS = Registry(
    "optimizer",
    "embedtrain.optimizers",
    {
        "rowwise_adagrad": "embedtrain.optim.formulas:RowwiseAdagrad",
        "adagrad": "embedtrain.optim.formulas:Adagrad",
        "sgd": "embedtrain.optim.formulas:SGD",
        "adam": "embedtrain.optim.formulas:Adam",
        "rowwise_adam": "embedtrain.optim.formulas:RowwiseAdam",
        "rmsprop": "embedtrain.optim.formulas:RMSprop",
    },
    _check,
)
"""Maps the names that a configuration uses to the optimizer classes."""

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "Combined",
    "CommonOptions",
    "CurvatureDamping",
    "Damping",
    "Preconditioner",
    "RMSprop",
    "RowState",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "SparseOptimizer",
    "Touched",
]
