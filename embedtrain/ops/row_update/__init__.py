"""The update of the rows that a step touched: by a formula of one's own, or by running moments of the gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch

Direction = Callable[[Tensor, Sequence[Tensor]], Tensor | tuple[Tensor, Tensor]]
"""A formula: takes gradients [n, dim] and the rows' states, which it updates in place; returns what is taken from the
rows times the step size, [n, dim], or its numerator and denominator."""


@dataclass(frozen=True, kw_only=True)
class RowStep:
    """What every formula has in common. In this order: the gradient is scaled, clipped, decayed; the row is stepped
    and brought below its largest norm.

    Attributes:
        lr: learning rate of this step.
        grad_factor: of every gradient; negative where the objective is maximised. A scalar float32 on the weights'
            device where the host does not know it, NaN for a step that is to leave all rows and states as they are.
        max_row_grad_norm: gradients of larger L2 norm are scaled down to it, each row's by itself.
        weight_decay: L2 factor; added to the gradient as `weight_decay * row`, or, decoupled, taken from the
            row itself as `lr * weight_decay * row`.
        decoupled_weight_decay: which of the two.
        max_norm: rows of larger L2 norm are scaled down to it after the step.
        rounding_keys: [n] int64 for bfloat16 weights: a key per row and step for stochastic rounding.
    """

    lr: float
    grad_factor: float | Tensor = 1.0
    max_row_grad_norm: float = math.inf
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False
    max_norm: float = math.inf
    rounding_keys: Tensor | None = None

    def with_known_factor(self) -> RowStep | None:
        """Returns the step with a factor that the host knows, for which it waits; None for one that changes nothing."""
        if not isinstance(self.grad_factor, Tensor):
            return self
        factor = float(self.grad_factor)
        return None if math.isnan(factor) else replace(self, grad_factor=factor)

    @property
    def coupled_decay(self) -> float:
        """What of a row is added to its gradient."""
        return 0.0 if self.decoupled_weight_decay else self.weight_decay

    @property
    def row_factor(self) -> float:
        """What of a row is left by decoupled decay."""
        return 1.0 - self.lr * self.weight_decay if self.decoupled_weight_decay else 1.0


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The coefficients of running moments of the gradient `g`.

    `first += (1 - first_decay) * (g - first)`, where it is kept, else `first = g`; `second = second_decay * second
    + second_gain * g * g`, of every element, or of the mean over dim. Then
    `row -= lr / first_correction * first / (sqrt(second) / second_correction + eps)`, without the divisor where no
    second moment is kept.

    Attributes:
        first_decay: share of the first moment that is kept.
        first_correction: of its start from zero.
        second_decay: share of the second moment that is kept; 1 sums.
        second_gain: of what is added to it.
        second_correction: of the root's start from zero.
        eps: added outside the root.
    """

    first_decay: float = 0.0
    first_correction: float = 1.0
    second_decay: float = 1.0
    second_gain: float = 1.0
    second_correction: float = 1.0
    eps: float = 0.0


def row_update(
    weight: Tensor, states: Sequence[Tensor], rows: Tensor, row_grad: Tensor, step: RowStep, direction: Direction
) -> None:
    """Updates the given rows and their states in place, in float32, by a formula in PyTorch.

    Args:
        weight: [num_rows, dim] float32 or bfloat16; the local shard.
        states: [num_rows] or [num_rows, dim] float32 each.
        rows: [n] int64, unique; local rows.
        row_grad: [n, dim] float32; gradient of the global mean loss, duplicates already summed.
        step: what all formulas have in common.
        direction: the formula.

    Raises:
        ValueError: shapes or dtypes disagree.
    """
    from embedtrain.ops.row_update import reference

    _check(weight, states, rows, row_grad, step)
    known = step.with_known_factor() if rows.numel() else None
    if known is not None:
        reference.row_update(weight, states, rows, row_grad, known, direction)


def moment_update(
    weight: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    rows: Tensor,
    row_grad: Tensor,
    step: RowStep,
    moments: Moments,
) -> None:
    """Updates the given rows and their moments in place, in float32.

    Args:
        weight: [num_rows, dim] float32 or bfloat16; the local shard.
        first: [num_rows, dim] float32; first moments, or None for the gradient itself.
        second: [num_rows, dim] or [num_rows] float32; second moments of each element or of the row, or None.
        rows: [n] int64, unique; local rows.
        row_grad: [n, dim] float32; gradient of the global mean loss, duplicates already summed.
        step: what all formulas have in common.
        moments: the formula's coefficients.

    Raises:
        ValueError: shapes or dtypes disagree.

    Source: sums as Duchi et al. 2011 (Adagrad), averages as Tieleman and Hinton 2012 (RMSprop) and Kingma and Ba
    2015 (Adam); of touched rows only, as `torch.optim.SparseAdam`.
    """
    _check(weight, [state for state in (first, second) if state is not None], rows, row_grad, step)
    if first is not None and first.dim() != 2:
        raise ValueError(f"expected first [num_rows, dim], got {tuple(first.shape)}")
    if rows.numel() == 0:
        return
    if dispatch.uses_triton(weight):
        from embedtrain.ops.row_update import triton

        triton.moment_update(weight, first, second, rows, row_grad, step, moments)
        return
    known = step.with_known_factor()
    if known is None:
        return
    if dispatch.uses_native(weight):
        from embedtrain.ops.row_update import native

        native.moment_update(weight, first, second, rows, row_grad, known, moments)
    else:
        from embedtrain.ops.row_update import reference

        reference.moment_update(weight, first, second, rows, row_grad, known, moments)


def _check(weight: Tensor, states: Sequence[Tensor], rows: Tensor, row_grad: Tensor, step: RowStep) -> None:
    for state in states:
        if weight.dim() != 2 or state.shape not in (weight.shape, weight.shape[:1]):
            raise ValueError(
                f"expected weight [num_rows, dim] and state [num_rows] or [num_rows, dim], got {tuple(weight.shape)} "
                f"and {tuple(state.shape)}"
            )
    if row_grad.shape != (rows.numel(), weight.shape[1]):
        raise ValueError(f"expected row_grad [{rows.numel()}, {weight.shape[1]}], got {tuple(row_grad.shape)}")
    others = {row_grad.dtype, *(state.dtype for state in states)}
    if rows.dtype != torch.int64 or others != {torch.float32}:
        raise ValueError(f"expected rows int64, states and row_grad float32, got {rows.dtype} and {others}")
    if (weight.dtype == torch.bfloat16) != (step.rounding_keys is not None):
        raise ValueError(f"rounding_keys go with bfloat16 weights and only with them; weight is {weight.dtype}")
