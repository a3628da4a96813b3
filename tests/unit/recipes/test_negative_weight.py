"""The weight of the negatives' term by the popularity of the items."""

from __future__ import annotations

import numpy as np
import pytest

from embedtrain.recipes.retrieval.negative_weight import default_negative_weight, popularity_skew


def test_the_skew_is_the_relative_entropy_to_a_uniform_popularity() -> None:
    shares = np.array([0.7, 0.2, 0.1])
    expected = float((shares * np.log(shares * 3)).sum())
    assert popularity_skew(np.array([70, 0, 20, 10])) == pytest.approx(expected)
    assert popularity_skew(np.full(9, 4)) == pytest.approx(0.0, abs=1e-12)
    assert popularity_skew(np.zeros(3, np.int64)) == 0.0


def test_skewed_counts_weigh_negatives_more_up_to_a_bound() -> None:
    even, skewed, extreme = (
        default_negative_weight("bilateral_softmax", np.array(counts))
        for counts in ([5, 5], [9, 1], [10**9, *[1] * 99])
    )
    assert even == pytest.approx(1.0)
    assert even < skewed < extreme == 1.35


def test_weights_of_other_losses_do_not_depend_on_the_data() -> None:
    assert default_negative_weight("cosine_contrastive", np.array([9, 1])) == 100.0
    assert default_negative_weight("alignment_uniformity", np.array([9, 1])) == 1.0
