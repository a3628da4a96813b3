"""Losses of retrieval models.

Most losses compare the score of a positive, an item that a user chose, with the scores of negatives. They return one
loss per pair of a user and a positive, and take these arguments:

* `positive`: [m] float; score of each pair.
* `example`: [m] int64; index of each pair's user, a row of `negative`.
* `negative`: [n, c] float; scores of each user for the negatives. An item that the user is known to have is not a
  negative: its score is `NOT_A_NEGATIVE`, it costs nothing and gets no gradient.
* `log_sum`: [n] float, instead of `negative`; log of the sum of exp(score) over the negatives of each user.

Alignment and uniformity are computed from vectors, not from scores: see `alignment` and `potential`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_A_NEGATIVE = -1e30
"""Score of an item that is not a negative. Finite, so that gradients are finite for a user without negatives."""

SHARPNESS = 2.0
"""Factor of squared distances in the uniformity; the value of Wang and Isola 2020."""


def unit_vectors(vectors: Tensor) -> Tensor:
    """Returns `torch.nn.functional.normalize(vectors, dim=1)`, whose backward takes twice as long; [n, dim]."""
    unit: Tensor = _UnitVectors.apply(vectors)  # type: ignore[no-untyped-call]
    return unit


class _UnitVectors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor) -> Tensor:
        lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True).clamp_(min=1e-12)
        unit: Tensor = vectors / lengths
        ctx.save_for_backward(unit, lengths)
        return unit

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        unit, lengths = ctx.saved_tensors
        along = (grad * unit).sum(dim=1, keepdim=True)
        return torch.addcmul(grad, unit, along, value=-1).div_(lengths)


def hardest(negative: Tensor, num_hard: int) -> Tensor:
    """Returns the highest scores of each user's negatives, [n, min(num_hard, c)].

    Source: Zhang et al. 2013, "Optimizing top-N collaborative filtering via dynamic negative item sampling".
    """
    return negative.topk(min(num_hard, negative.shape[1]), dim=1, sorted=False).values


def scores_of(users: Tensor, candidates: Tensor, correction: Tensor | None, known: tuple[Tensor, Tensor]) -> Tensor:
    """Returns the scores of users for candidates as the argument `negative` of the losses, [n, c] float32.

    Args:
        users: [n, dim].
        candidates: [c, dim].
        correction: [c]; added to the scores of each candidate; None for no correction.
        known: [k] int64 each; indices of users and of candidates that are not their negatives.
    """
    if torch.is_autocast_enabled(users.device.type):
        # Under autocast, `linear` would round the correction to the low-precision dtype, so it is added in float32.
        scores = F.linear(users, candidates).float()
        scores = scores if correction is None else scores.add_(correction)
    else:
        scores = F.linear(users, candidates, correction)
    # The scalar is created on the device, because copying one would need a device sync.
    return scores.index_put_(known, torch.full((), NOT_A_NEGATIVE, device=scores.device))


def log_sum_of_scores(
    users: Tensor, candidates: Tensor, correction: Tensor | None, known: tuple[Tensor, Tensor]
) -> Tensor:
    """Returns `torch.logsumexp(scores_of(...), dim=1)`, [n], with fewer passes over the scores.

    Apart from matrix products, forward makes four passes over the scores, and backward makes none.
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
        # The lower bound makes all exponentials 0, not 1, for a user without negatives: known items get no gradient.
        largest = scores.amax(dim=1, keepdim=True).clamp_(min=NOT_A_NEGATIVE / 2)
        exponentials = scores.sub_(largest).exp_()
        sums = exponentials.sum(dim=1).clamp_(min=torch.finfo(torch.float32).tiny)
        ctx.save_for_backward(users, candidates, exponentials, sums)
        return sums.log() + largest.squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        users, candidates, exponentials, sums = ctx.saved_tensors
        # Each row's factor is multiplied into a matrix of width dim, which is narrower than the exponentials.
        factors = (grad / sums).unsqueeze(1)
        return (exponentials @ candidates) * factors, exponentials.T @ (users * factors), None, None


def softmax_loss(positive: Tensor, example: Tensor, log_sum: Tensor) -> Tensor:
    """Returns the cross-entropy of each pair's positive against the negatives of its user; [m].

    With the logQ correction it estimates the softmax over the whole catalogue: the log of each item's expected count
    among the negatives of a step must then be subtracted from its scores.

    Source: Bengio and Senecal 2008, "Adaptive importance sampling to accelerate training of a neural probabilistic
    language model" (the correction); Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item
    recommendations" (with in-batch negatives).
    """
    return torch.logaddexp(positive, log_sum[example]) - positive


def bilateral_softmax_loss(positive: Tensor, example: Tensor, log_sum: Tensor, *, weight: float) -> Tensor:
    """Returns weight * log_sum - positive; [m].

    Unlike in softmax, the sum does not contain the positive. A weight above 1 pushes rare items further away, so that
    popular items are recommended more. The scores of negatives are corrected as for `softmax_loss`.

    Source: Wu et al. 2024, "BSL: understanding and improving softmax loss for recommendation". The paper has separate
    temperatures for positives and negatives, whose ratio is the weight. As in the authors' code, both scores are
    divided by one temperature here.
    """
    has_negatives = log_sum > NOT_A_NEGATIVE / 4
    return weight * torch.where(has_negatives, log_sum, 0.0)[example] - positive


def bpr_loss(positive: Tensor, example: Tensor, negative: Tensor) -> Tensor:
    """Returns the mean of -log sigmoid(positive - negative) over the negatives; [m].

    Source: Rendle et al. 2009, "BPR: Bayesian personalized ranking from implicit feedback".
    """
    costs = F.softplus(negative[example] - positive.unsqueeze(1)).sum(dim=1)
    return costs / _num_negatives(negative)[example]


def cosine_contrastive_loss(
    positive: Tensor, example: Tensor, negative: Tensor, *, margin: float, weight: float
) -> Tensor:
    """Returns (1 - positive) + weight * mean(max(0, negative - margin)); [m]. Scores must be cosines.

    Source: Mao et al. 2021, "SimpleX: a simple and strong baseline for collaborative filtering".
    """
    costs = F.relu(negative - margin).sum(dim=1) / _num_negatives(negative)
    return (1.0 - positive) + weight * costs[example]


def alignment(users: Tensor, example: Tensor, positives: Tensor) -> Tensor:
    """Returns the squared distance between the two vectors of each pair; [m].

    Args:
        users: [n, dim].
        example: [m] int64; index of each pair's user.
        positives: [m, dim].

    Source: Wang et al. 2022, "Towards representation alignment and uniformity in collaborative filtering" (DirectAU):
    the loss is the mean alignment plus a weight times the mean of the users' and the items' uniformity.
    """
    return (users[example] - positives).square().sum(dim=1)


def potential(own: Tensor, every: Tensor, first: int) -> Tensor:
    """Returns the sum of exp(-SHARPNESS * squared distance) over all pairs of a vector in `own` and another in `every`.

    The uniformity is the log of the mean over all pairs.

    Args:
        own: [n, dim] vectors of length 1.
        every: [c, dim] vectors of length 1, which contain `own` as consecutive rows.
        first: index in `every` of the first row of `own`.

    Source: Wang and Isola 2020, "Understanding contrastive representation learning through alignment and uniformity on
    the hypersphere".
    """
    cosines = F.linear(own, every).float()
    cosines.diagonal(offset=first).fill_(NOT_A_NEGATIVE)
    # The squared distance of unit vectors is 2 - 2 * cosine.
    return torch.exp(2.0 * SHARPNESS * (cosines - 1.0)).sum()


def _num_negatives(negative: Tensor) -> Tensor:
    return (negative > NOT_A_NEGATIVE).sum(dim=1).clamp(min=1)
