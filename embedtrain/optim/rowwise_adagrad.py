"""Adagrad with one accumulator a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedtrain.ops.row_update import Moments
from embedtrain.optim.adagrad import ACCUMULATOR, decayed_rate
from embedtrain.optim.moments import MomentOptimizer
from embedtrain.optim.optimizer import CommonOptions, HasRowGroups, RowState, check_share

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RowwiseAdagrad(MomentOptimizer):
    """Adagrad whose accumulator is one float32 a row: the running sum of the mean square of its gradient.

    `state += mean(g * g)`, then `row -= lr_t * g / (sqrt(state) + eps)`, for the rows that the step touched.

    Args:
        collection: the tables.
        lr: learning rate.
        eps: added outside the square root.
        initial_accumulator_value: first value of every accumulator.
        lr_decay: `lr_t = lr / (1 + (step - 1) * lr_decay)`.
        accumulator_decay: where given, the accumulator is an average that forgets, and steps do not shrink for
            ever: `state = accumulator_decay * state + (1 - accumulator_decay) * mean(g * g)`.
        options: see `SparseOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Duchi et al. 2011, "Adaptive subgradient methods"; one accumulator a row as in Lerer et al. 2019
    (PyTorch-BigGraph); hyperparameters as `torch.optim.Adagrad`.
    """

    def __init__(
        self,
        collection: HasRowGroups,
        *,
        lr: float = 0.01,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        lr_decay: float = 0.0,
        accumulator_decay: float | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        if accumulator_decay is not None:
            check_share("accumulator_decay", accumulator_decay)
        defaults = {
            "lr": lr,
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
            "lr_decay": lr_decay,
            "accumulator_decay": accumulator_decay,
        }
        super().__init__(collection, defaults, second=RowState(ACCUMULATOR, fill=initial_accumulator_value), **options)

    def moments(self, settings: dict[str, Any]) -> Moments:
        """Sums mean squares, or averages them."""
        decay = settings["accumulator_decay"]
        if decay is None:
            return Moments(eps=settings["eps"])
        return Moments(second_decay=decay, second_gain=1.0 - decay, eps=settings["eps"])

    def rate(self, settings: dict[str, Any]) -> float:
        """Returns `lr_t`."""
        return decayed_rate(settings)
