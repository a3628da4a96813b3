from __future__ import annotations

import numpy as np
import pytest

from embedtrain.metrics.score_curves import calibration_bins, lift_by_tenth, roc_curve


def scored(count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(2)
    probabilities = generator.random(count).round(2)
    return probabilities, generator.random(count) < probabilities


@pytest.mark.parametrize("count", [50, 5_000])
def test_the_area_under_the_roc_curve_is_the_auc(count: int) -> None:
    scores, labels = scored(count)
    false_rate, true_rate = roc_curve(scores, labels)
    above = np.sign(scores[labels][:, None] - scores[~labels])
    auc = (above.mean() + 1) / 2
    assert len(false_rate) <= 200
    assert (false_rate[0], true_rate[0], false_rate[-1], true_rate[-1]) == (0, 0, 1, 1)
    assert _area(true_rate, false_rate) == pytest.approx(auc, abs=1e-3)


def test_long_curves_are_thinned() -> None:
    generator = np.random.default_rng(1)
    scores, labels = generator.random(10_000), generator.random(10_000) < 0.3
    false_rate, true_rate = roc_curve(scores, labels)
    assert len(false_rate) <= 200
    assert (np.diff(false_rate) >= 0).all() and (np.diff(true_rate) >= 0).all()
    assert max(np.diff(false_rate + true_rate)) < 0.03


def test_calibrated_scores_are_near_the_diagonal_and_equal_ones_share_a_bin() -> None:
    scores, labels = scored(20_000)
    predicted, observed = calibration_bins(scores, labels)
    assert len(predicted) == 10
    np.testing.assert_allclose(predicted, observed, atol=0.03)
    predicted, observed = calibration_bins(np.full(100, 0.25), np.arange(100) < 40)
    assert (predicted.tolist(), observed.tolist()) == ([0.25], [0.4])


def test_lift_is_relative_to_the_share_of_positives() -> None:
    lift = lift_by_tenth(-np.arange(100.0), np.arange(100) < 20)
    assert lift.tolist() == [5, 5, *[0] * 8]


def _area(y: np.ndarray, x: np.ndarray) -> float:
    return float((np.diff(x) * (y[1:] + y[:-1]) / 2).sum())
