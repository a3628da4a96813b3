"""Adagrad with one accumulator an element."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedtrain.ops.row_update import Moments
from embedtrain.optim.moments import MomentOptimizer
from embedtrain.optim.optimizer import CommonOptions, HasRowGroups, RowState

if TYPE_CHECKING:
    from typing_extensions import Unpack

ACCUMULATOR = "accumulator"
"""Name of the state in a checkpoint."""


class Adagrad(MomentOptimizer):
    """Adagrad with an accumulator for each element: the running sum of the squares of its gradient.

    `state += g * g`, then `row -= lr_t * g / (sqrt(state) + eps)`, for the rows that the step touched.

    Args:
        collection: the tables.
        lr: learning rate.
        eps: added outside the square root.
        initial_accumulator_value: first value of every accumulator.
        lr_decay: `lr_t = lr / (1 + (step - 1) * lr_decay)`.
        options: see `SparseOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Duchi et al. 2011, "Adaptive subgradient methods"; hyperparameters as `torch.optim.Adagrad`.
    """

    def __init__(
        self,
        collection: HasRowGroups,
        *,
        lr: float = 0.01,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        lr_decay: float = 0.0,
        **options: Unpack[CommonOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
            "lr_decay": lr_decay,
        }
        second = RowState(ACCUMULATOR, per_element=True, fill=initial_accumulator_value)
        super().__init__(collection, defaults, second=second, **options)

    def moments(self, settings: dict[str, Any]) -> Moments:
        """Sums squares."""
        return Moments(eps=settings["eps"])

    def rate(self, settings: dict[str, Any]) -> float:
        """Returns `lr_t`."""
        return decayed_rate(settings)


def decayed_rate(settings: dict[str, Any]) -> float:
    """Returns `lr / (1 + (step - 1) * lr_decay)`."""
    return float(settings["lr"] / (1.0 + (settings["step"] - 1) * settings["lr_decay"]))
