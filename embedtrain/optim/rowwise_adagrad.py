"""Adagrad with one accumulator a row."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from embedtrain.ops.rowwise_adagrad import RowwiseAdagradStep, rowwise_adagrad
from embedtrain.optim.sparse import HasRowGroups, NonFinitePolicy, RowStore, SparseOptimizer

ACCUMULATOR = "accumulator"
"""Name of the state in a checkpoint."""


class RowwiseAdagrad(SparseOptimizer):
    """Adagrad whose accumulator is one float32 a row: the running sum of the mean square of its gradient.

    `state += mean(g * g)`, then `row -= lr_t * g / (sqrt(state) + eps)`, for the rows that the step touched.

    Args:
        collection: the tables.
        lr: learning rate.
        eps: added outside the square root.
        initial_accumulator_value: first value of every accumulator.
        lr_decay: `lr_t = lr / (1 + (step - 1) * lr_decay)`.
        weight_decay: L2 factor, on touched rows only; added to the gradient as `weight_decay * row`.
        decoupled_weight_decay: takes `lr_t * weight_decay * row` from the row instead, apart from the gradient.
        max_grad_norm: see `SparseOptimizer`.
        nonfinite: see `SparseOptimizer`.

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
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        nonfinite: NonFinitePolicy = "error",
    ) -> None:
        hyperparameters = {
            "lr": lr,
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
        }
        for name, value in hyperparameters.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        defaults = {**hyperparameters, "decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(collection, defaults, max_grad_norm=max_grad_norm, nonfinite=nonfinite)
        for store in self._stores:
            store.allocate_state(ACCUMULATOR, initial_accumulator_value)

    def update(self, store: RowStore, rows: Tensor, grad: Tensor, settings: dict[str, Any]) -> None:
        """Applies the formula above to the touched rows."""
        lr = settings["lr"] / (1.0 + (settings["step"] - 1) * settings["lr_decay"])
        step = RowwiseAdagradStep(
            lr=lr,
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
            decoupled_weight_decay=settings["decoupled_weight_decay"],
            rounding_keys=store.rounding_keys(rows, settings["step"]),
        )
        rowwise_adagrad(store.weight, store.state[ACCUMULATOR], rows, grad, step)
