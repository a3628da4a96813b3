"""Row-wise Adagrad in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from embedtrain.ops._backend.stochastic_rounding import round_to_bfloat16
from embedtrain.ops.rowwise_adagrad.types import RowwiseAdagradStep


def rowwise_adagrad(
    weight: Tensor, accumulator: Tensor, rows: Tensor, row_grad: Tensor, step: RowwiseAdagradStep
) -> None:
    """See `embedtrain.ops.rowwise_adagrad`."""
    old = weight[rows].float()
    grad = row_grad
    if step.weight_decay and not step.decoupled_weight_decay:
        grad = grad + step.weight_decay * old
    state = accumulator[rows] + grad.square().mean(dim=1)
    accumulator[rows] = state
    if step.decoupled_weight_decay:
        old = old * (1.0 - step.lr * step.weight_decay)
    new = old - grad * (step.lr / (state.sqrt() + step.eps)).unsqueeze(1)
    if step.rounding_keys is None:
        weight[rows] = new.to(weight.dtype)
    else:
        weight[rows] = round_to_bfloat16(new, step.rounding_keys)
