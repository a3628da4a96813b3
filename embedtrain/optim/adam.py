"""Adam of the touched rows, with second moments of each element, and of the row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from embedtrain.ops.row_update import Moments
from embedtrain.optim.moments import MomentOptimizer
from embedtrain.optim.optimizer import CommonOptions, HasRowGroups, RowState, check_share

if TYPE_CHECKING:
    from typing_extensions import Unpack

FIRST, SECOND = "exp_avg", "exp_avg_sq"
"""Names of the states in a checkpoint, as `torch.optim.Adam` calls them."""


class Adam(MomentOptimizer):
    """Adam whose moments change in the steps that touch their row, as in `torch.optim.SparseAdam`.

    `first += (1 - beta1) * (g - first)`, `second = beta2 * second + (1 - beta2) * g * g`, then
    `row -= lr / (1 - beta1^t) * first / (sqrt(second) / sqrt(1 - beta2^t) + eps)`, with t the count of steps.
    With `decoupled_weight_decay` it is AdamW.

    Args:
        collection: the tables.
        lr: learning rate.
        betas: shares of the first and second moments that a step keeps.
        eps: added outside the square root.
        options: see `SparseOptimizer`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Kingma and Ba 2015, "Adam"; Loshchilov and Hutter 2019 for decoupled decay.
    """

    _is_rowwise = False

    def __init__(
        self,
        collection: HasRowGroups,
        *,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Unpack[CommonOptions],
    ) -> None:
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        for position, beta in enumerate(betas):
            check_share(f"betas[{position}]", beta)
        super().__init__(
            collection,
            {"lr": lr, "betas": tuple(betas), "eps": eps},
            first=RowState(FIRST, per_element=True),
            second=RowState(SECOND, per_element=not self._is_rowwise),
            **options,
        )

    def moments(self, settings: dict[str, Any]) -> Moments:
        """Averages, corrected for their start from zero."""
        beta1, beta2 = settings["betas"]
        return Moments(
            first_decay=beta1,
            first_correction=1.0 - beta1 ** settings["step"],
            second_decay=beta2,
            second_gain=1.0 - beta2,
            second_correction=math.sqrt(1.0 - beta2 ** settings["step"]),
            eps=settings["eps"],
        )


class RowwiseAdam(Adam):
    """Adam with one second moment a row: the running average of the mean square of its gradient.

    Nearly half of Adam's state; everything else is as in `Adam`.
    """

    _is_rowwise = True
