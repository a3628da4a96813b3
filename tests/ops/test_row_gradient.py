"""Gradients that wait unsummed: the same rows, values and updates as when they are summed first."""

from __future__ import annotations

import pytest
import torch

from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.row_gradient import Delivery, RowGradient, Run
from embedtrain.ops.row_update import Moments, RowStep, moment_update
from embedtrain.ops.sort_unique import OrderedKeys
from tests.ops.test_damp_rows import make_damping
from tests.ops.updates import RowwiseAdagradStep, rowwise_adagrad

NUM_ROWS = 60
MOST_INTERPRETED = 60
"""Bags a feature where Triton's interpreter runs the kernels: a dozen of their chunks, and a second."""
STEP = RowwiseAdagradStep(lr=0.1, eps=1e-6, weight_decay=0.02)


def make_delivery(num_bags: int, dim: int, seed: int, *, in_runs: bool) -> Delivery:
    """Four features of two tables of 40 and 20 rows: one value a bag, sums, weighted, means; one got no gradient."""
    generator = torch.Generator().manual_seed(seed)
    bags: list[Bags] = []
    rows: list[torch.Tensor] = []
    for number in range(5):
        lengths = torch.randint(0, 4, (num_bags,), generator=generator)
        num_values = num_bags if number == 0 else int(lengths.sum())
        weights = torch.rand(num_values, generator=generator) if number == 2 else None
        bags.append(Bags(num_values, None if number == 0 else lengths, weights, is_mean=number == 3))
        first, size = (0, 40) if number < 3 else (40, 20)
        rows.append(first + torch.randint(0, size, (num_values,), generator=generator))
    grads = [torch.randn(feature.num_bags, dim, generator=generator) for feature in bags]
    sizes = [feature.num_values for feature in bags]
    runs = [Run(sum(sizes[:3]), 0, 40), Run(sum(sizes[3:]), 40, 20)] if in_runs else []
    return Delivery(torch.cat(rows), bags, [*grads[:4], None], runs=runs)


def summed_by_hand(deliveries: list[Delivery], dim: int, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.zeros(NUM_ROWS, dim, dtype=torch.float64)
    for delivery in deliveries:
        parts = delivery.rows.split([feature.num_values for feature in delivery.bags])
        for feature, rows, grad in zip(delivery.bags, parts, delivery.grads, strict=True):
            if grad is None:
                continue
            lengths = torch.ones_like(rows) if feature.lengths is None else feature.lengths
            if feature.is_mean:
                grad = grad / lengths.clamp(min=1).unsqueeze(1)
            of_values = grad.double().repeat_interleave(lengths, dim=0)
            if feature.weights is not None:
                of_values = of_values * feature.weights.unsqueeze(1)
            total.index_add_(0, rows, of_values)
    rows = torch.cat([delivery.rows for delivery in deliveries]).unique()
    return rows, (total[rows] * factor).float()


@pytest.mark.parametrize("dim", [1, 3, 32, 64, 100, 128, 300])
@pytest.mark.parametrize(
    ("num_bags", "num_deliveries", "in_runs"), [(0, 1, False), (1, 1, True), (900, 1, True), (300, 2, False)]
)
def test_an_update_sums_as_one_does_by_hand(
    threaded_backend: str, num_bags: int, num_deliveries: int, in_runs: bool, dim: int
) -> None:
    num_bags = min(num_bags, MOST_INTERPRETED) if threaded_backend == "triton" else num_bags
    deliveries = [make_delivery(num_bags, dim, seed, in_runs=in_runs) for seed in range(num_deliveries)]
    rows, values = summed_by_hand(deliveries, dim, 0.5)
    gradient = RowGradient(deliveries, num_rows=NUM_ROWS, dim=dim, factor=0.5)
    assert torch.equal(gradient.rows, rows)
    # Float32 sums of up to a hundred terms.
    torch.testing.assert_close(gradient.values, values, rtol=1e-5, atol=1e-5)
    weight, accumulator = torch.randn(NUM_ROWS, dim), torch.rand(NUM_ROWS)
    expected, state = weight.clone(), accumulator.clone()
    rowwise_adagrad(weight, accumulator, RowGradient(deliveries, num_rows=NUM_ROWS, dim=dim, factor=0.5), STEP)
    rowwise_adagrad(expected, state, RowGradient.of_rows(rows, values, NUM_ROWS), STEP)
    torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(accumulator, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 20, 128])
@pytest.mark.parametrize("is_damped", [False, True])
@pytest.mark.parametrize("has_first", [False, True])
def test_sums_within_an_update_have_the_bits_of_sums_before_it(
    threaded_backend: str, has_first: bool, is_damped: bool, dim: int
) -> None:
    num_bags = 15 if threaded_backend == "triton" else 3000
    deliveries = [make_delivery(num_bags, dim, seed, in_runs=False) for seed in (1, 2)]
    found = []
    for is_summed_before in (False, True):
        gradient = RowGradient(deliveries, num_rows=NUM_ROWS, dim=dim, factor=0.3)
        if is_summed_before:
            _ = gradient.sums
        if is_damped:
            gradient = gradient.damped(make_damping(gradient.count_rows(), dim, min(3, dim)))
        first = torch.full((NUM_ROWS, dim), 0.5) if has_first else None
        weight, second = torch.ones(NUM_ROWS, dim), torch.ones(NUM_ROWS, dim)
        moments = Moments(first_decay=0.9 if has_first else 0.0, eps=1e-3)
        moment_update(weight, first, second, gradient, RowStep(lr=0.5), moments)
        found.append((weight, second))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("num_values", [0, 1, 70])
def test_an_update_need_not_know_how_many_rows_are_distinct(backend: str, num_values: int) -> None:
    generator = torch.Generator().manual_seed(num_values)
    rows = torch.randint(0, NUM_ROWS, (num_values,), generator=generator)
    grads = [torch.randn(num_values, 8, generator=generator)]

    def gradient_of(rows: torch.Tensor, bags: Bags, *, is_counted: bool = False) -> RowGradient:
        ordered = OrderedKeys(rows, is_counted=is_counted)
        return RowGradient([Delivery(rows, [bags], grads, ordered=ordered)], num_rows=NUM_ROWS, dim=8, factor=0.5)

    exact = gradient_of(rows, Bags(num_values), is_counted=True)
    assert exact.padded() is exact
    inspected = gradient_of(rows, Bags(num_values))
    inspected.values.mul_(2.0)
    assert inspected.padded() is inspected, "it would update by other gradients than the caller was shown"
    long_bags = gradient_of(rows.repeat(3), Bags(3 * num_values, torch.full((num_values,), 3)))
    assert num_values == 0 or long_bags.padded() is long_bags

    padded = gradient_of(rows, Bags(num_values)).padded()
    assert padded.is_padded == (backend == "triton")
    if padded.is_padded:
        m = exact.count_rows()
        assert padded.rows.tolist() == exact.rows.tolist() + [NUM_ROWS] * (num_values - m)
        assert torch.equal(padded.values[:m], exact.values) and not padded.values[m:].any()
    weight, accumulator = torch.randn(NUM_ROWS, 8), torch.rand(NUM_ROWS)
    expected, state = weight.clone(), accumulator.clone()
    rowwise_adagrad(weight, accumulator, padded, STEP)
    rowwise_adagrad(expected, state, exact, STEP)
    assert torch.equal(weight, expected) and torch.equal(accumulator, state)


@pytest.mark.parametrize("num_empty", [0, 1, 4, 2000])
def test_weighted_bags_without_values_change_no_row(backend: str, num_empty: int) -> None:
    lengths = torch.zeros(num_empty, dtype=torch.int64)
    bags = [Bags(0, lengths, torch.zeros(0)), Bags(4)]
    grads = [torch.ones(num_empty, 8), torch.ones(4, 8)]
    gradient = RowGradient([Delivery(torch.arange(4), bags, grads)], num_rows=NUM_ROWS, dim=8)
    weight, accumulator = torch.ones(NUM_ROWS, 8), torch.zeros(NUM_ROWS)
    rowwise_adagrad(weight, accumulator, gradient, STEP)
    assert accumulator.nonzero().flatten().tolist() == [0, 1, 2, 3]
    assert (weight[4:] == 1).all()


@pytest.mark.parametrize("num_values", [50, 100_000])
def test_an_update_is_the_same_bits_every_time(threaded_backend: str, num_values: int) -> None:
    num_values = min(num_values, 10 * MOST_INTERPRETED) if threaded_backend == "triton" else num_values
    rows = (torch.rand(2, num_values, generator=torch.Generator().manual_seed(1)).prod(dim=0) * NUM_ROWS).long()
    results = []
    for _ in range(2):
        weight, accumulator = torch.ones(NUM_ROWS, 32), torch.zeros(NUM_ROWS)
        grad = torch.linspace(-1, 1, num_values).unsqueeze(1).expand(-1, 32)
        gradient = RowGradient([Delivery(rows, [Bags(num_values)], [grad])], num_rows=NUM_ROWS, dim=32)
        rowwise_adagrad(weight, accumulator, gradient, STEP)
        results.append((weight, accumulator))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("grad", "weights", "is_finite"),
    [
        ([1.0, -2.0], None, True),
        ([1.0, float("nan")], None, False),
        ([float("-inf"), 1.0], None, False),
        ([2e38, 2e38], None, False),  # finite, and their sum is not
        ([2e38, -2e38], None, True),
        ([2e38, 1.0], [2.0, 1.0], False),
        ([1.0, 1.0], [float("inf"), 1.0], False),
    ],
)
def test_it_is_known_whether_sums_are_finite(
    backend: str, grad: list[float], weights: list[float] | None, is_finite: bool
) -> None:
    bags = Bags(2, None, None if weights is None else torch.tensor(weights))
    delivery = Delivery(torch.tensor([3, 3]), [bags], [torch.tensor(grad).unsqueeze(1)])
    assert RowGradient([delivery], num_rows=NUM_ROWS, dim=1).is_finite() is is_finite


def test_the_norm_of_large_finite_gradients_is_finite(backend: str) -> None:
    gradient = RowGradient.of_rows(torch.tensor([1]), torch.full((1, 4), 1e25), NUM_ROWS)
    assert gradient.sum_of_squares() == pytest.approx(4e50)


def test_gradients_that_were_changed_or_do_not_fit_are_refused(backend: str) -> None:
    grad = torch.ones(2, 3)
    delivery = Delivery(torch.tensor([1, 2]), [Bags(2)], [grad])
    with pytest.raises(ValueError, match="expected a gradient"):
        RowGradient([delivery], num_rows=NUM_ROWS, dim=4)
    with pytest.raises(ValueError, match="expected rows"):
        RowGradient([Delivery(torch.tensor([1]), [Bags(2)], [grad])], num_rows=NUM_ROWS, dim=3)
    grad.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        RowGradient([delivery], num_rows=NUM_ROWS, dim=3)


def test_a_row_outside_the_table_is_an_index_error_or_left_out(backend: str) -> None:
    delivery = Delivery(torch.tensor([1, 2]), [Bags(2)], [torch.ones(2, 3)])
    weight = torch.zeros(2, 3)
    if backend == "triton":
        rowwise_adagrad(weight, torch.zeros(2), RowGradient([delivery], num_rows=2, dim=3), STEP)
        assert not weight[0].any() and weight[1].all()
        return
    with pytest.raises(IndexError):
        rowwise_adagrad(weight, torch.zeros(2), RowGradient([delivery], num_rows=2, dim=3), STEP)
    assert not weight.any()
