"""Curves of predicted probabilities against labels: ROC, calibration and lift."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MAX_POINTS = 200

Floats = NDArray[np.float64]


def roc_curve(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Returns the false and true positive rates of at most 200 thresholds, from (0, 0) to (1, 1).

    Args:
        scores: [n].
        labels: [n]; at least one positive and one negative.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    positives = np.cumsum(labels[order])[ends]
    negatives = ends + 1 - positives
    false_rate = np.append(0.0, negatives / negatives[-1])
    true_rate = np.append(0.0, positives / positives[-1])
    if len(false_rate) <= _MAX_POINTS:
        return false_rate, true_rate
    # Kept points have about equal distances along the curve, so that steep and flat parts keep equally many.
    travelled = false_rate + true_rate
    kept = np.unique(np.searchsorted(travelled, np.linspace(0, 2, _MAX_POINTS)).clip(0, len(travelled) - 1))
    return false_rate[kept], true_rate[kept]


def calibration_bins(
    probabilities: NDArray[np.floating], labels: NDArray[np.bool_], num_bins: int = 10
) -> tuple[Floats, Floats]:
    """Returns mean predicted probability and share of positives per bin, in rising order of probability.

    All bins hold about equally many examples.

    Args:
        probabilities: [n].
        labels: [n].
        num_bins: maximum number of bins; bins with equal mean probability are merged.
    """
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, num_bins) if len(part)]
    means = np.array([probabilities[part].mean(dtype=np.float64) for part in parts])
    shares = np.array([labels[part].mean() for part in parts])
    sizes = np.array([len(part) for part in parts])
    distinct, place = np.unique(means, return_inverse=True)
    return distinct, np.bincount(place, shares * sizes) / np.bincount(place, sizes)


def lift_by_tenth(scores: NDArray[np.floating], labels: NDArray[np.bool_]) -> Floats:
    """Returns the lift of each tenth of the examples, the tenth with the highest scores first; [10].

    Lift is the share of positives in a tenth divided by the share of positives in all examples.

    Args:
        scores: [n].
        labels: [n]; at least one positive.
    """
    order = np.argsort(-scores, kind="stable")
    shares = [labels[part].mean() if len(part) else np.nan for part in np.array_split(order, 10)]
    lift: Floats = np.array(shares) / labels.mean()
    return lift
