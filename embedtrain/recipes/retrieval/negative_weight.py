"""The default weight of the negatives' term in retrieval losses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from embedtrain.recipes.retrieval.config import Loss

_OF_CONTRAST, _OF_UNIFORMITY = 100.0, 1.0

_PER_NAT, _MOST = 0.47, 1.35
"""Chosen on validation parts of Gowalla, MovieLens 100K and Amazon Beauty; see docs/retrieval.md."""


def default_negative_weight(loss: Loss, counts: NDArray[np.int64]) -> float:
    """Returns the weight of the negatives' term.

    Args:
        loss: the training loss.
        counts: [num_items]; number of interactions of each item.
    """
    if loss == "cosine_contrastive":
        return _OF_CONTRAST
    if loss == "alignment_uniformity":
        return _OF_UNIFORMITY
    return min(_MOST, 1.0 + _PER_NAT * popularity_skew(counts))


def popularity_skew(counts: NDArray[np.int64]) -> float:
    """Returns the Kullback-Leibler divergence of the items' popularity from the uniform distribution, in nats.

    It is 0 if all counts are equal. Items without interactions are left out.
    """
    counts = counts[counts > 0]
    shares = counts / max(1, counts.sum())
    return float(np.log(max(1, len(counts))) + (shares * np.log(shares)).sum())
