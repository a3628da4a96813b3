"""The scalars of a row-wise Adagrad update."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RowwiseAdagradStep:
    """The scalars of one update.

    Attributes:
        lr: learning rate of this step.
        eps: added outside the square root.
        weight_decay: L2 factor; added to the gradient as `weight_decay * row`, or, decoupled, taken from the
            row itself as `lr * weight_decay * row`.
        decoupled_weight_decay: which of the two.
        rounding_keys: [n] int64 for bfloat16 weights: a key per row and step for stochastic rounding.
    """

    lr: float
    eps: float
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    rounding_keys: Tensor | None = None
