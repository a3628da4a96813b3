"""Measures of lists against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from embedtrain.metrics.ranking import hits_of, list_measures, mean_measures

# Three users: hits at places 2 and 3 of 4 relevant; none of 1; at place 1 of 1.
HITS = torch.tensor([[0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
NUM_RELEVANT = torch.tensor([4, 1, 1])


def test_measures_at_three() -> None:
    measures = mean_measures(list_measures(HITS, NUM_RELEVANT, 3).unsqueeze(0), 3, [3])
    dcg = 1 / math.log2(3) + 1 / math.log2(4)
    ideal = 1 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)  # four are relevant, three have a place
    assert measures["recall@3"] == pytest.approx((2 / 4 + 0 + 1) / 3)
    assert measures["ndcg@3"] == pytest.approx((dcg / ideal + 0 + 1) / 3)
    assert measures["hit@3"] == pytest.approx(2 / 3)
    assert measures["mrr@3"] == pytest.approx((1 / 2 + 0 + 1) / 3)


def test_measures_at_five_and_at_one() -> None:
    measures = mean_measures(torch.stack([list_measures(HITS, NUM_RELEVANT, k) for k in (5, 1)]), 3, [5, 1])
    dcg = 1 / math.log2(3) + 1 / math.log2(4) + 1 / math.log2(6)
    ideal = sum(1 / math.log2(place + 1) for place in (1, 2, 3, 4))
    assert measures["recall@5"] == pytest.approx((3 / 4 + 0 + 1) / 3)
    assert measures["ndcg@5"] == pytest.approx((dcg / ideal + 0 + 1) / 3)
    assert measures["mrr@5"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert measures["recall@1"] == measures["ndcg@1"] == measures["hit@1"] == pytest.approx(1 / 3)


def test_a_user_may_have_more_relevant_items_than_there_are() -> None:
    measures = mean_measures(list_measures(HITS[:, :3], torch.tensor([7, 1, 1]), 5).unsqueeze(0), 3, [5])
    dcg = 1 / math.log2(3) + 1 / math.log2(4)
    ideal = sum(1 / math.log2(place + 1) for place in (1, 2, 3, 4, 5))
    assert measures["ndcg@5"] == pytest.approx((dcg / ideal + 0 + 1) / 3)
    assert measures["recall@5"] == pytest.approx((2 / 7 + 0 + 1) / 3)


def test_hits_are_found_user_by_user() -> None:
    recommended = torch.tensor([[4, 0, 2], [9, -1, -1]])
    starts, relevant = torch.tensor([0, 3, 4]), torch.tensor([2, 9, -1, 4])
    assert hits_of(recommended, starts, relevant, 10).tolist() == [[False, False, True], [False, False, False]]
