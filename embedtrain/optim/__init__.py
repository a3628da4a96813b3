"""Sparse optimizers: formulas over the rows that a step touched."""

from embedtrain.optim.combined import Combined
from embedtrain.optim.formulas import SGD, Adagrad, Adam, RMSprop, RowwiseAdagrad, RowwiseAdam
from embedtrain.optim.optimizer import CommonOptions, RowState, SparseOptimizer
from embedtrain.optim.registry import Optimizers

OPTIMIZERS = Optimizers(
    {
        "rowwise_adagrad": RowwiseAdagrad,
        "adagrad": Adagrad,
        "sgd": SGD,
        "adam": Adam,
        "rowwise_adam": RowwiseAdam,
        "rmsprop": RMSprop,
    }
)
"""The optimizers by their names in a configuration."""

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "Combined",
    "CommonOptions",
    "RMSprop",
    "RowState",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "SparseOptimizer",
]
