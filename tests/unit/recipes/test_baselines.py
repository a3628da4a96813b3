"""Baselines are their textbook definitions, computed without a dense matrix of users by items."""

from __future__ import annotations

import numpy as np
import pytest

from embedtrain.data.bags import Bags
from embedtrain.errors import UserError
from embedtrain.recipes import baselines
from embedtrain.recipes.baselines import ease, item_knn, measure_scores, popularity

NUM_USERS, NUM_ITEMS = 40, 23


@pytest.fixture
def matrix() -> np.ndarray:
    generator = np.random.default_rng(3)
    return (generator.random((NUM_USERS, NUM_ITEMS)) < np.linspace(0.5, 0.05, NUM_ITEMS)).astype(np.float64)


def bags_of(matrix: np.ndarray) -> Bags:
    rows, items = np.nonzero(matrix)
    return Bags.from_rows(rows, items, len(matrix))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "_ROWS_AT_ONCE", 5)


def test_popularity_is_the_number_of_users(matrix: np.ndarray) -> None:
    scores = popularity(bags_of(matrix), NUM_ITEMS)(np.array([3, 5]))
    np.testing.assert_array_equal(scores, np.stack([matrix.sum(0)] * 2))


def test_item_knn_sums_the_similarities_of_the_nearest(matrix: np.ndarray) -> None:
    common = matrix.T @ matrix
    norms = np.sqrt(matrix.sum(0))
    similar = common / (np.outer(norms, norms) + 2.5)
    np.fill_diagonal(similar, 0)
    expected = np.zeros_like(similar)
    for item in range(NUM_ITEMS):
        nearest = np.lexsort((np.arange(NUM_ITEMS), -similar[:, item]))[:4]
        expected[nearest, item] = similar[nearest, item]
    users = np.array([0, 7, 39])
    scores = item_knn(bags_of(matrix), NUM_ITEMS, neighbors=4, shrink=2.5)(users)
    np.testing.assert_allclose(scores, matrix[users] @ expected, rtol=1e-5, atol=1e-6)


def test_ease_is_the_regression_without_a_diagonal(matrix: np.ndarray) -> None:
    inverse = np.linalg.inv(matrix.T @ matrix + 3.0 * np.eye(NUM_ITEMS))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    users = np.array([1, 2, 38])
    scores = ease(bags_of(matrix), NUM_ITEMS, regularization=3.0)(users)
    np.testing.assert_allclose(scores, matrix[users] @ weights, rtol=1e-4, atol=1e-5)


def test_ease_without_a_solution_is_refused() -> None:
    known = Bags.from_rows(np.array([0, 0]), np.array([0, 1]), 1)
    with pytest.raises(UserError, match=r"EASE cannot be solved with a regularization of 0"):
        ease(known, 2, regularization=0.0)


def test_lists_leave_out_what_is_known_and_prefer_popular_items_of_equal_scores() -> None:
    known = Bags.from_rows(np.array([0, 1]), np.array([0, 2]), 2)
    held_out = Bags.from_rows(np.array([0, 1]), np.array([1, 1]), 2)
    scores = np.array([[9, 1, 1, 1, 0], [1, 0, 9, 2, 0]], np.float32)

    def of(users: np.ndarray) -> np.ndarray:
        return scores[users]

    masked = measure_scores(of, 5, known, held_out, [1, 3])
    assert masked["hit@1"] == pytest.approx(0.5)  # user 0: of three equal items the most popular one
    assert masked["recall@3"] == pytest.approx(1.0)
    assert measure_scores(of, 5, None, held_out, [1])["hit@1"] == 0.0
    assert masked["item_coverage@1"] == pytest.approx(2 / 5)
