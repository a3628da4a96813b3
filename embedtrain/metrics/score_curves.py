"""Curves of predicted probabilities against labels: ROC, calibration and lift."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MAX_POINTS = 200

Floats = NDArray[np.float64]


def roc_curve(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Returns the false and the true positive rates over all thresholds, from (0, 0) to (1, 1), thinned.

    Args:
        scores: [n].
        labels: [n]; at least one of each kind.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    positives = np.cumsum(labels[order])[ends]
    negatives = ends + 1 - positives
    false_rate = np.append(0.0, negatives / negatives[-1])
    true_rate = np.append(0.0, positives / positives[-1])
    if len(false_rate) <= _MAX_POINTS:
        return false_rate, true_rate
    # The points that lie nearest to equal distances along the curve: steep parts keep as many as flat ones.
    travelled = false_rate + true_rate
    kept = np.unique(np.searchsorted(travelled, np.linspace(0, 2, _MAX_POINTS)).clip(0, len(travelled) - 1))
    return false_rate[kept], true_rate[kept]


def calibration_bins(
    probabilities: NDArray[np.floating], labels: NDArray[np.bool_], num_bins: int = 10
) -> tuple[Floats, Floats]:
    """Returns the mean probability and the share of positives of bins of equally many examples, in rising order.

    Args:
        probabilities: [n].
        labels: [n].
        num_bins: at most; bins of one mean probability are merged.
    """
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if len(part)]
    means = np.array([probabilities[part].mean(dtype=np.float64) for part in parts])
    shares = np.array([labels[part].mean() for part in parts])
    sizes = np.array([len(part) for part in parts])
    distinct, place = np.unique(means, return_inverse=True)
    return distinct, np.bincount(place, shares * sizes) / np.bincount(place, sizes)


def lift_by_tenth(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> Floats:
    """Returns the share of positives in each tenth of the examples, best scored first, over the share in all.

    Args:
        scores: [n].
        labels: [n]; at least one positive.
    """
    order = np.argsort(-scores, kind="stable")
    shares = [labels[part].mean() if len(part) else np.nan for part in np.array_split(order, 10)]
    lift: Floats = np.array(shares) / labels.mean()
    return lift
