"""Sparse optimizers: formulas over the rows that a step touched."""

from embedtrain.optim.adagrad import Adagrad
from embedtrain.optim.adam import Adam, RowwiseAdam
from embedtrain.optim.combined import Combined
from embedtrain.optim.optimizer import RowState, SparseOptimizer
from embedtrain.optim.rmsprop import RMSprop
from embedtrain.optim.rowwise_adagrad import RowwiseAdagrad
from embedtrain.optim.sgd import SGD

OPTIMIZERS: dict[str, type[SparseOptimizer]] = {
    "rowwise_adagrad": RowwiseAdagrad,
    "adagrad": Adagrad,
    "sgd": SGD,
    "adam": Adam,
    "rowwise_adam": RowwiseAdam,
    "rmsprop": RMSprop,
}
"""The optimizers by their names in a configuration."""

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "Combined",
    "RMSprop",
    "RowState",
    "RowwiseAdagrad",
    "RowwiseAdam",
    "SparseOptimizer",
]
