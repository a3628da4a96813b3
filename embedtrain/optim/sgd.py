"""Plain gradient descent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedtrain.ops.row_update import Moments
from embedtrain.optim.moments import MomentOptimizer
from embedtrain.optim.optimizer import CommonOptions, HasRowGroups

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SGD(MomentOptimizer):
    """`row -= lr * g`, for the rows that the step touched; without momentum, hence without state.

    Args:
        collection: the tables.
        lr: learning rate.
        options: see `SparseOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.
    """

    def __init__(self, collection: HasRowGroups, *, lr: float = 0.01, **options: Unpack[CommonOptions]) -> None:
        super().__init__(collection, {"lr": lr}, **options)

    def moments(self, settings: dict[str, Any]) -> Moments:
        """None are kept."""
        return Moments()
