"""Softmax over all items of a table that is sharded over the ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from embedtrain.distributed.ranks import Ranks


def full_softmax(states: Tensor, rows: Tensor, targets: Tensor, ranks: Ranks, states_at_once: int) -> Tensor:
    """Returns the summed cross-entropy of the states whose target is among this rank's rows.

    The sum of the results over the ranks is the loss of all states. Each rank scores all states against its own rows
    and sends the log of its sum of exponentials to the others; no rows are sent.

    Forward also computes the gradients, because the scores are too large to keep for backward. The gradient of `states`
    is this rank's part, which must be summed over the ranks. The gradient of `rows` is complete.

    Collective: every rank, with the same states.

    Args:
        states: [m, dim] float32; states of all ranks.
        rows: [n, dim] float32; rows of this rank.
        targets: [m] int64; index in `rows` of each state's target, -1 if another rank owns the target.
        ranks: the ranks that share the items.
        states_at_once: number of states per part, which bounds memory to `states_at_once * n` scores.
    """
    total: Tensor = _FullSoftmax.apply(states, rows, targets, ranks, states_at_once)  # type: ignore[no-untyped-call]
    return total


class _FullSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, rows: Tensor, targets: Tensor, ranks: Ranks, states_at_once: int) -> Tensor:
        grad_states, grad_rows = torch.empty_like(states), torch.zeros_like(rows)
        total = torch.zeros((), dtype=torch.float64, device=states.device)
        for start in range(0, len(states), states_at_once):
            part = slice(start, start + states_at_once)
            own, target = states[part], targets[part]
            (is_here,) = torch.nonzero(target >= 0, as_tuple=True)
            target = target[is_here]
            scores = (own @ rows.T).float()
            of_target = scores[is_here, target]
            exponentials, log_sum = _exponentials(scores, ranks)
            total += (log_sum[is_here] - of_target).sum(dtype=torch.float64)
            exponentials[is_here, target] -= 1.0
            grad_states[part] = exponentials @ rows
            if torch.is_autocast_enabled(states.device.type):
                grad_rows += exponentials.T @ own
            else:
                grad_rows.addmm_(exponentials.T, own)
        ctx.save_for_backward(grad_states, grad_rows)
        return total.to(states.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_rows = ctx.saved_tensors
        return grad_states * grad, grad_rows * grad, None, None, None


def _exponentials(scores: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Turns scores [m, n] into this rank's part of the softmax, in place; returns it and the log-sum-exp of all ranks.

    Collective: every rank.
    """
    if not scores.shape[1]:  # the ranks outnumber the rows
        return scores, _over_ranks(scores.new_full((len(scores),), -torch.inf), ranks)
    largest = scores.amax(dim=1)
    scores.sub_(largest.unsqueeze(1)).exp_()
    log_sum = _over_ranks(scores.sum(dim=1).log_().add_(largest), ranks)
    return scores.mul_((largest - log_sum).exp_().unsqueeze(1)), log_sum


def _over_ranks(log_sum: Tensor, ranks: Ranks) -> Tensor:
    """Returns the log of the sum of exponentials over the ranks, from each rank's log [m]. Collective: every rank."""
    if ranks.size == 1:
        return log_sum
    every = ranks.all_gather_rows(log_sum.unsqueeze(1), [len(log_sum)] * ranks.size)
    return every.view(ranks.size, len(log_sum)).logsumexp(dim=0)
