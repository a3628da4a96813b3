"""Losses of retrieval.

Most compare the score of an item that a user chose with the scores of sampled items. They return a loss for each pair
of a user and an item, and take:

    positive: [m] float; the score of each pair.
    example: [m] int64; the row among `negative` of each pair's user.
    negative: [n, c] float; the scores of each user for the negatives. Where a negative is none, since the user is
        known to have it, its score is `NOT_A_NEGATIVE`: it costs nothing and gets no gradient.
    log_sum: [n] float, in place of `negative`; the logarithm of the sum of exp(score) over each user's negatives.

Alignment and uniformity are measured on the vectors themselves: `alignment` and `potential`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_A_NEGATIVE = -1e30
"""Finite, so that the gradient is finite if a user has no negative at all."""

SHARPNESS = 2.0
"""The factor of squared distances in the uniformity of vectors, as Wang and Isola chose it."""


def hardest(negative: Tensor, num_hard: int) -> Tensor:
    """Returns the highest scores of each user, [n, min(num_hard, c)]: the negatives that training learns most from.

    Source: Zhang et al. 2013, "Optimizing top-N collaborative filtering via dynamic negative item sampling".
    """
    return negative.topk(min(num_hard, negative.shape[1]), dim=1, sorted=False).values


def scores_of(users: Tensor, candidates: Tensor, correction: Tensor | None, known: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the scores of users [n, dim] for candidates [c, dim], [n, c] float32: `negative`, see above.

    Args:
        users: [n, dim].
        candidates: [c, dim].
        correction: [c]; added to the scores of each candidate.
        known: [k] int64 each; the users and candidates, by place, that are no negatives.
    """
    if torch.is_autocast_enabled(users.device.type):
        # The product takes the correction in its own dtype, which would round away more of it than of the product.
        scores = F.linear(users, candidates).float()
        scores = scores if correction is None else scores.add_(correction)
    else:
        scores = F.linear(users, candidates, correction)
    # The number is made on the device: for a copy of one the host would wait.
    return scores.index_put_(known, torch.full((), NOT_A_NEGATIVE, device=scores.device))


def log_sum_of_scores(
    users: Tensor, candidates: Tensor, correction: Tensor | None, known: tuple[Tensor, Tensor]
) -> Tensor:
    """Returns `torch.logsumexp(scores_of(...), dim=1)`, [n], with fewer passes over the scores.

    They are gone over four times, and not at all by backward, beside the matrix products.
    """
    if torch.is_autocast_enabled(users.device.type) or not len(candidates):
        return torch.logsumexp(scores_of(users, candidates, correction, known), dim=1)
    log_sum: Tensor = _LogSumOfScores.apply(users, candidates, correction, known)  # type: ignore[no-untyped-call]
    return log_sum


class _LogSumOfScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, users: Tensor, candidates: Tensor, correction: Tensor | None, known: tuple[Tensor, Tensor]
    ) -> Tensor:
        scores = scores_of(users, candidates, correction, known)
        # Of a user without negatives all exponentials are 0, not 1: known items get no gradient.
        largest = scores.amax(dim=1, keepdim=True).clamp_(min=NOT_A_NEGATIVE / 2)
        exponentials = scores.sub_(largest).exp_()
        sums = exponentials.sum(dim=1).clamp_(min=torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(users, candidates, exponentials, sums)
        return sums.log() + largest.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        users, candidates, exponentials, sums = ctx.saved_tensors
        # The factor of a row of exponentials is taken by the narrower side of each product.
        factors = (grad / sums).unsqueeze(1)
        return (exponentials @ candidates) * factors, exponentials.T @ (users * factors), None, None


def softmax_loss(positive: Tensor, example: Tensor, log_sum: Tensor) -> Tensor:
    """Returns the cross-entropy of each pair among itself and the negatives of its user; [m].

    Given scores from which the logarithm was subtracted of how often their items are expected among the negatives
    of a step, it estimates the softmax over the whole catalogue from a sample of it.

    Source: Bengio and Senecal 2008, "Adaptive importance sampling to accelerate training of a neural probabilistic
    language model" (the correction); Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item
    recommendations" (in a batch).
    """
    return torch.logaddexp(positive, log_sum[example]) - positive


def bilateral_softmax_loss(positive: Tensor, example: Tensor, log_sum: Tensor, *, weight: float) -> Tensor:
    """Returns weight * log_sum - positive; [m].

    The sum does not hold the positive, unlike that of softmax. A weight above 1 pushes items that few users have
    further away, so popular items are recommended more. Corrections of the negatives' scores are as in `softmax_loss`.

    Source: Wu et al. 2024, "BSL: understanding and improving softmax loss for recommendation": positives and negatives
    have a temperature each, whose ratio weighs the negatives' term. As in its authors' code, both scores are divided by
    the same temperature.
    """
    has_negatives = log_sum > NOT_A_NEGATIVE / 4
    return weight * torch.where(has_negatives, log_sum, 0.0)[example] - positive


def bpr_loss(positive: Tensor, example: Tensor, negative: Tensor) -> Tensor:
    """Returns the mean over the negatives of -log sigmoid(positive - negative); [m].

    Source: Rendle et al. 2009, "BPR: Bayesian personalized ranking from implicit feedback".
    """
    costs = F.softplus(negative[example] - positive.unsqueeze(1)).sum(dim=1)
    return costs / _num_negatives(negative)[example]


def cosine_contrastive_loss(
    positive: Tensor, example: Tensor, negative: Tensor, *, margin: float, weight: float
) -> Tensor:
    """Returns (1 - positive) + weight * mean(max(0, negative - margin)); [m]. Scores are cosines.

    Source: Mao et al. 2021, "SimpleX: a simple and strong baseline for collaborative filtering".
    """
    costs = F.relu(negative - margin).sum(dim=1) / _num_negatives(negative)
    return (1.0 - positive) + weight * costs[example]


def alignment(users: Tensor, example: Tensor, positives: Tensor) -> Tensor:
    """Returns the squared distance of each pair's vectors; [m].

    Source: Wang et al. 2022, "Towards representation alignment and uniformity in collaborative filtering" (DirectAU):
    the loss is the mean alignment plus a weight times the mean of the users' and the items' uniformity.
    """
    return (users[example] - positives).square().sum(dim=1)


def potential(own: Tensor, every: Tensor, first: int) -> Tensor:
    """Returns the sum of exp(-SHARPNESS * squared distance) over all pairs of one of `own` and another of `every`.

    The logarithm of the mean over all pairs is the uniformity of vectors.

    Args:
        own: [n, dim], of length 1.
        every: [c, dim], of length 1; `own` among them.
        first: the place of the first of `own` in `every`.

    Source: Wang and Isola 2020, "Understanding contrastive representation learning through alignment and uniformity on
    the hypersphere".
    """
    cosines = F.linear(own, every).float()
    cosines.diagonal(offset=first).fill_(NOT_A_NEGATIVE)
    # Of unit vectors the squared distance is 2 - 2 * cosine.
    return torch.exp(2.0 * SHARPNESS * (cosines - 1.0)).sum()


def _num_negatives(negative: Tensor) -> Tensor:
    return (negative > NOT_A_NEGATIVE).sum(dim=1).clamp(min=1)
