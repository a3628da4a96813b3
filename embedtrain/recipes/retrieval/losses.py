"""Losses of retrieval: the score of an item that a user chose, against the scores of sampled items.

Each takes the same scores and returns a loss for each pair of a user and an item:

    positive: [m] float; the score of each pair.
    example: [m] int64; the row among `negative` of each pair's user.
    negative: [n, c] float; the scores of each user for the negatives. Where a negative is none, since the user is
        known to have it, its score is `NOT_A_NEGATIVE`: it costs nothing and gets no gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

NOT_A_NEGATIVE = -1e30
"""Finite, so that the gradient is finite if a user has no negative at all."""


def softmax_loss(positive: Tensor, example: Tensor, negative: Tensor) -> Tensor:
    """Returns the cross-entropy of each pair among itself and the negatives of its user; [m].

    Given scores from which the logarithm was subtracted of how often their items are expected among the negatives
    of a step, it estimates the softmax over the whole catalogue from a sample of it.

    Source: Bengio and Senecal 2008, "Adaptive importance sampling to accelerate training of a neural probabilistic
    language model" (the correction); Yi et al. 2019, "Sampling-bias-corrected neural modeling for large corpus item
    recommendations" (in a batch).
    """
    # One sum over the negatives serves all of a user's pairs.
    of_negatives = torch.logsumexp(negative, dim=1)
    return torch.logaddexp(positive, of_negatives[example]) - positive


def bpr_loss(positive: Tensor, example: Tensor, negative: Tensor) -> Tensor:
    """Returns the mean over the negatives of -log sigmoid(positive - negative); [m].

    Source: Rendle et al. 2009, "BPR: Bayesian personalized ranking from implicit feedback".
    """
    costs = F.softplus(negative[example] - positive.unsqueeze(1)).sum(dim=1)
    return costs / _num_negatives(negative)[example]


def margin_loss(positive: Tensor, example: Tensor, negative: Tensor, *, margin: float, weight: float) -> Tensor:
    """Returns (1 - positive) + weight * mean(max(0, negative - margin)); [m].

    Source: Mao et al. 2021, "SimpleX: a simple and strong baseline for collaborative filtering" (cosine contrastive
    loss).
    """
    costs = F.relu(negative - margin).sum(dim=1) / _num_negatives(negative)
    return (1.0 - positive) + weight * costs[example]


def _num_negatives(negative: Tensor) -> Tensor:
    return (negative > NOT_A_NEGATIVE).sum(dim=1).clamp(min=1)
