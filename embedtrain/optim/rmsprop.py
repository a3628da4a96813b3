"""RMSprop of the touched rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedtrain.ops.row_update import Moments
from embedtrain.optim.moments import MomentOptimizer
from embedtrain.optim.optimizer import CommonOptions, HasRowGroups, RowState, check_share

if TYPE_CHECKING:
    from typing_extensions import Unpack

SQUARE_AVERAGE = "square_avg"
"""Name of the state in a checkpoint, as `torch.optim.RMSprop` calls it."""


class RMSprop(MomentOptimizer):
    """RMSprop whose average changes in the steps that touch its row.

    `state = alpha * state + (1 - alpha) * g * g`, then `row -= lr * g / (sqrt(state) + eps)`.

    Args:
        collection: the tables.
        lr: learning rate.
        alpha: share of the average that a step keeps.
        eps: added outside the square root.
        options: see `SparseOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Tieleman and Hinton 2012, lecture 6.5; hyperparameters as `torch.optim.RMSprop`, which also offers
    momentum and centring.
    """

    def __init__(
        self,
        collection: HasRowGroups,
        *,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        **options: Unpack[CommonOptions],
    ) -> None:
        check_share("alpha", alpha)
        second = RowState(SQUARE_AVERAGE, per_element=True)
        super().__init__(collection, {"lr": lr, "alpha": alpha, "eps": eps}, second=second, **options)

    def moments(self, settings: dict[str, Any]) -> Moments:
        """Averages squares."""
        return Moments(second_decay=settings["alpha"], second_gain=1.0 - settings["alpha"], eps=settings["eps"])
