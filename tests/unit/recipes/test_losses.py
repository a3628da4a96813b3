"""Each loss against its formula, written out pair by pair."""

from __future__ import annotations

import math

import pytest
import torch

from embedtrain.recipes.retrieval.losses import (
    NOT_A_NEGATIVE,
    bilateral_softmax_loss,
    bpr_loss,
    cosine_contrastive_loss,
    hardest,
    softmax_loss,
)

POSITIVE = [0.3, -0.2, 1.5]
EXAMPLE = [0, 0, 1]
NEGATIVE = [[0.1, NOT_A_NEGATIVE, 0.9, 0.6], [0.2, 0.7, -0.4, NOT_A_NEGATIVE]]


def softmax(positive: float, negatives: list[float]) -> float:
    return -math.log(math.exp(positive) / (math.exp(positive) + sum(map(math.exp, negatives))))


def bpr(positive: float, negatives: list[float]) -> float:
    return sum(-math.log(1 / (1 + math.exp(negative - positive))) for negative in negatives) / len(negatives)


def bilateral_softmax(positive: float, negatives: list[float]) -> float:
    return 1.3 * math.log(sum(map(math.exp, negatives))) - positive


def cosine_contrastive(positive: float, negatives: list[float]) -> float:
    return 1 - positive + 20 * sum(max(0, negative - 0.5) for negative in negatives) / len(negatives)


FORMULAS = {
    softmax_loss: softmax,
    bpr_loss: bpr,
    lambda *scores: bilateral_softmax_loss(*scores, weight=1.3): bilateral_softmax,
    lambda *scores: cosine_contrastive_loss(*scores, margin=0.5, weight=20): cosine_contrastive,
}


@pytest.mark.parametrize("loss", FORMULAS)
def test_a_loss_is_its_formula(loss) -> None:
    positive, negative = torch.tensor(POSITIVE, requires_grad=True), torch.tensor(NEGATIVE, requires_grad=True)
    found = loss(positive, torch.tensor(EXAMPLE), negative)
    for value, score, row in zip(found.tolist(), POSITIVE, EXAMPLE, strict=True):
        negatives = [each for each in NEGATIVE[row] if each != NOT_A_NEGATIVE]
        assert value == pytest.approx(FORMULAS[loss](score, negatives), rel=1e-5)
    found.sum().backward()
    assert positive.grad.isfinite().all() and negative.grad.isfinite().all()
    assert (negative.grad[negative == NOT_A_NEGATIVE] == 0).all()


@pytest.mark.parametrize("loss", FORMULAS)
def test_a_user_without_negatives_and_an_empty_batch_have_finite_gradients(loss) -> None:
    nothing_to_score = torch.full((1, 3), NOT_A_NEGATIVE), torch.zeros(1, 0), torch.zeros(0, 3)
    for num_pairs, negative in zip((1, 1, 0), nothing_to_score, strict=True):
        positive, negative = torch.zeros(num_pairs, requires_grad=True), negative.requires_grad_()
        found = loss(positive, torch.zeros(num_pairs, dtype=torch.int64), negative)
        assert (found.abs() < 10).all()
        found.sum().backward()
        assert positive.grad.isfinite().all() and negative.grad.isfinite().all()


def test_only_the_hardest_negatives_of_a_user_cost_anything() -> None:
    negative = torch.tensor(NEGATIVE, requires_grad=True)
    found = hardest(negative, 2)
    assert [sorted(row) for row in found.tolist()] == [pytest.approx([0.6, 0.9]), pytest.approx([0.2, 0.7])]
    found.sum().backward()
    assert negative.grad.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert hardest(negative, 9).shape == (2, 4)
