"""Baselines are their textbook definitions, computed without a dense matrix of users by items."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from embedtrain.data.bags import Bags
from embedtrain.errors import UserError
from embedtrain.recipes import baselines
from embedtrain.recipes.baselines import ease, item_knn, measure_scores, popularity
from embedtrain.recipes.lists import measure_next

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
    scores = popularity(bags_of(matrix), NUM_ITEMS)(sparse.csr_array(matrix[[3, 5]]))
    np.testing.assert_array_equal(scores, np.stack([matrix.sum(0)] * 2))


@pytest.mark.parametrize("alpha", [0.5, 0.7])
def test_item_knn_sums_the_similarities_of_the_nearest(matrix: np.ndarray, alpha: float) -> None:
    common = matrix.T @ matrix
    counts = matrix.sum(0)
    similar = common / (np.outer(counts**alpha, counts ** (1 - alpha)) + 2.5)
    np.fill_diagonal(similar, 0)
    expected = np.zeros_like(similar)
    for item in range(NUM_ITEMS):
        nearest = np.lexsort((np.arange(NUM_ITEMS), -similar[:, item]))[:4]
        expected[nearest, item] = similar[nearest, item]
    users = np.array([0, 7, 39])
    scores = item_knn(bags_of(matrix), NUM_ITEMS, neighbors=4, shrink=2.5, alpha=alpha)(sparse.csr_array(matrix[users]))
    np.testing.assert_allclose(scores, matrix[users] @ expected, rtol=1e-5, atol=1e-6)


def test_ease_is_the_regression_without_a_diagonal(matrix: np.ndarray) -> None:
    inverse = np.linalg.inv(matrix.T @ matrix + 3.0 * np.eye(NUM_ITEMS))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    users = np.array([1, 2, 38])
    scores = ease(bags_of(matrix), NUM_ITEMS, regularization=3.0)(sparse.csr_array(matrix[users]))
    np.testing.assert_allclose(scores, matrix[users] @ weights, rtol=1e-4, atol=1e-5)


def test_ease_without_a_solution_is_refused() -> None:
    known = Bags.from_rows(np.array([0, 0]), np.array([0, 1]), 1)
    with pytest.raises(UserError, match=r"EASE cannot be solved with a regularization of 0"):
        ease(known, 2, regularization=0.0)


def test_lists_leave_out_what_is_known_and_prefer_popular_items_of_equal_scores() -> None:
    known = Bags.from_rows(np.array([0, 1]), np.array([0, 2]), 2)
    held_out = Bags.from_rows(np.array([0, 1]), np.array([1, 1]), 2)
    scores = np.array([[9, 1, 1, 1, 0], [1, 0, 9, 2, 0]], np.float32)

    def of(histories: sparse.csr_array) -> np.ndarray:
        return scores[: histories.shape[0]]

    masked = measure_scores(of, 5, known, known, held_out, [1, 3])
    assert masked["hit@1"] == pytest.approx(0.5)  # user 0: of three equal items the most popular one
    assert masked["recall@3"] == pytest.approx(1.0)
    assert measure_scores(of, 5, known, None, held_out, [1])["hit@1"] == 0.0
    assert masked["item_coverage@1"] == pytest.approx(2 / 5)


def test_of_many_equal_scores_the_most_popular_items_come_first() -> None:
    num_items, nobody = 1000, Bags.from_rows(np.zeros(0, np.int64), np.zeros(0, np.int64), 1)
    held_out = Bags.from_rows(np.zeros(3, np.int64), np.array([0, 1, 999]), 1)
    scores = np.zeros((1, num_items), np.float32)
    scores[0, 1::2] = -0.0
    scores[0, 999] = 1.0
    assert measure_scores(lambda _: scores, num_items, nobody, None, held_out, [3])["recall@3"] == 1.0


def test_keys_are_in_the_order_of_scores() -> None:
    scores = torch.tensor([[3.0, -torch.inf, -1.5, 0.0, -0.0, 1e-30, -2.0, 3.0]])
    assert baselines._keys(scores).argsort(descending=True).tolist() == [[0, 7, 5, 3, 4, 2, 6, 1]]


def test_what_comes_next_is_measured_with_and_without_the_history() -> None:
    histories = Bags.from_rows(np.array([0, 0, 2]), np.array([4, 1, 3]), 3)
    held_out = Bags.from_rows(np.array([0, 1, 2]), np.array([1, 2, -1]), 3)
    asked = []

    def measure(known: Bags | None, found: Bags) -> dict[str, float]:
        asked.append((None if known is None else list(zip(known.rows(), known.values, strict=True)), found))
        return {"hit@1": float(known is None)}

    assert measure_next(measure, histories, held_out) == {"hit@1": 1.0, "masked_hit@1": 0.0}
    assert [each for each, _ in asked if each is not None] == [[(0, 4), (2, 3)]]  # item 1 repeats, and is to be found
    assert all(found.rows().tolist() == [0, 2] for _, found in asked)  # user 1 has no history


def test_held_out_items_that_all_repeat_earlier_ones_are_warned_of(
    matrix: np.ndarray, caplog: pytest.LogCaptureFixture
) -> None:
    known = bags_of(matrix)
    nothing = Bags.from_rows(np.zeros(0, np.int64), np.zeros(0, np.int64), NUM_USERS)
    measures = measure_scores(popularity(known, NUM_ITEMS), NUM_ITEMS, known, known, nothing, [5])
    assert not any(measures.values())
    assert "no user has a held-out item that a list could hold: all measures are 0" in caplog.text
