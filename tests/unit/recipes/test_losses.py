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
    log_sum_of_scores,
    scores_of,
    softmax_loss,
    unit_vectors,
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


def with_log_sum(positive: torch.Tensor, example: torch.Tensor, negative: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return positive, example, torch.logsumexp(negative, dim=1)


FORMULAS = {
    lambda *scores: softmax_loss(*with_log_sum(*scores)): softmax,
    bpr_loss: bpr,
    lambda *scores: bilateral_softmax_loss(*with_log_sum(*scores), weight=1.3): bilateral_softmax,
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


@pytest.mark.parametrize("num_candidates", [0, 1, 40])
@pytest.mark.parametrize("has_correction", [False, True])
def test_the_fused_sum_over_negatives_is_that_of_pytorch(num_candidates: int, has_correction: bool) -> None:
    generator = torch.Generator().manual_seed(num_candidates)
    given = [torch.randn(rows, 8, generator=generator) for rows in (9, num_candidates)]
    correction = torch.randn(num_candidates, generator=generator) if has_correction else None
    last = num_candidates - 1
    # The first user has every candidate; the last pair is named twice.
    pairs = [*((0, column) for column in range(num_candidates)), *([(3, 0), (5, last), (5, last)] if last >= 0 else [])]
    rows, columns = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    known = rows, columns
    found = [tensor.clone().requires_grad_() for tensor in given]
    expected = [tensor.clone().requires_grad_() for tensor in given]
    example, positive = torch.tensor([0, 0, 3, 5, 8]), torch.randn(5, generator=generator)
    values = []
    for log_sum in (
        log_sum_of_scores(*found, correction, known),
        torch.logsumexp(scores_of(*expected, correction, known), dim=1),
    ):
        bilateral = bilateral_softmax_loss(positive, example, log_sum, weight=1.3)
        losses = softmax_loss(positive, example, log_sum) + bilateral
        losses.sum().backward()
        values.append(losses.detach())
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_unit_vectors_and_their_gradients_equal_pytorchs() -> None:
    vectors = torch.randn(7, 5, generator=torch.Generator().manual_seed(4))
    vectors[2] = 0.0  # has no direction
    vectors[3] *= 1e-20
    factors = torch.arange(35.0).view(7, 5)
    found, expected = (vectors.clone().requires_grad_() for _ in range(2))
    unit, plain = unit_vectors(found), torch.nn.functional.normalize(expected, dim=1)
    assert torch.equal(unit, plain)
    (unit * factors).sum().backward()
    (plain * factors).sum().backward()
    torch.testing.assert_close(found.grad, expected.grad)
