"""Sparse optimizers: formulas over the rows that a step touched."""

from embedtrain.optim.rowwise_adagrad import RowwiseAdagrad
from embedtrain.optim.sparse import SparseOptimizer

__all__ = ["RowwiseAdagrad", "SparseOptimizer"]
