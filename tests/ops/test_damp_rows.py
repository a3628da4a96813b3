"""Damping against its definition in float64, in every implementation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from embedtrain.ops.damp_rows import Damping, damp_rows
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.row_gradient import Delivery, RowGradient
from embedtrain.ops.row_update import Moments, RowStep, moment_update
from embedtrain.ops.skipgram_block import count_of_rows
from tests.ops.test_skipgram_block import SHAPES, make

SHAPES_OF_DAMPING = [(0, 3, 1), (1, 1, 1), (5, 4, 0), (37, 33, 4), (2100, 64, 5), (9, 17, 4)]


def make_damping(num_rows: int, dim: int, k: int) -> Damping:
    generator = torch.Generator().manual_seed(dim)
    tables = torch.randint(0, 2, (num_rows,), generator=generator)
    times = torch.rand(num_rows, generator=generator) ** 4 * 100  # from far below the switch of formulas to far above
    times[::5] = 0
    curvatures = torch.rand(2, k, generator=generator)
    curvatures[1, :1] = -1e-9  # as rounding leaves a curvature of 0
    directions = torch.linalg.qr(torch.randn(2, dim, k, generator=generator)).Q.mT.contiguous()
    return Damping(tables, times, curvatures, directions)


def damp_exactly(grad: Tensor, damping: Damping) -> Tensor:
    x = (damping.times[:, None] * damping.curvatures.clamp(min=0)[damping.tables]).double()
    shares = torch.where(x > 0, -torch.expm1(-x) / x, 1.0)
    own = damping.directions[damping.tables].double()  # [n, k, dim]
    along = torch.einsum("nkd,nd->nk", own, grad.double())
    return grad.double() + torch.einsum("nk,nkd->nd", (shares - 1) * along, own)


@pytest.mark.parametrize(("num_rows", "dim", "k"), SHAPES_OF_DAMPING)
def test_each_direction_moves_as_far_as_small_steps_would(backend: str, num_rows: int, dim: int, k: int) -> None:
    if backend == "triton" and num_rows > 100:
        pytest.skip("the interpreter takes seconds")
    damping = make_damping(num_rows, dim, k)
    grad = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(k))
    before = grad.clone()
    found = damp_rows(grad, damping)
    assert torch.equal(grad, before), "the gradient is the caller's"
    torch.testing.assert_close(found.double(), damp_exactly(grad, damping), rtol=1e-5, atol=2e-6)
    assert torch.equal(found[::5], grad[::5])


@pytest.mark.parametrize(("num_rows", "dim", "k"), SHAPES_OF_DAMPING)
@pytest.mark.parametrize("second_shape", ["none", "row", "element"])
@pytest.mark.parametrize("is_summed", [True, False])
def test_an_update_damps_the_gradient_of_each_row(
    threaded_backend: str, num_rows: int, dim: int, k: int, second_shape: str, is_summed: bool
) -> None:
    if threaded_backend == "triton" and num_rows > 100:
        pytest.skip("the interpreter takes seconds")
    generator = torch.Generator().manual_seed(k)
    grad = torch.randn(num_rows, dim, generator=generator)
    rows = torch.randperm(num_rows + 7, generator=generator)[:num_rows].sort().values
    damping = make_damping(num_rows, dim, k)
    gradient = RowGradient.of_rows(rows, grad, num_rows + 7)
    if not is_summed:  # two deliveries, of which each row gets half
        halves = [Delivery(rows, [Bags(num_rows)], [grad / 2]) for _ in range(2)]
        gradient = RowGradient(halves, num_rows=num_rows + 7, dim=dim)
    weight = torch.randn(num_rows + 7, dim, generator=generator)
    shape = {"none": None, "row": (num_rows + 7,), "element": (num_rows + 7, dim)}[second_shape]
    second = None if shape is None else torch.ones(shape)
    expected, expected_second = weight.double(), None if second is None else second.double()
    exact = damp_exactly(grad, damping)
    step, moments = RowStep(lr=0.5), Moments(eps=1e-3)
    direction = exact
    if expected_second is not None:
        expected_second[rows] += exact.square() if second_shape == "element" else exact.square().mean(dim=1)
        divisor = expected_second[rows].sqrt() + moments.eps
        direction = exact / (divisor if second_shape == "element" else divisor[:, None])
    expected[rows] -= step.lr * direction
    moment_update(weight, None, second, gradient.damped(damping), step, moments)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=2e-6)
    if second is not None and expected_second is not None:
        torch.testing.assert_close(second.double(), expected_second, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("has_first", [False, True])
@pytest.mark.parametrize("bound", [float("inf"), 0.7])
def test_damping_comes_before_all_other_options(threaded_backend: str, has_first: bool, bound: float) -> None:
    """An update that damps is the update by the damped gradient, of bfloat16 rows too."""
    generator = torch.Generator().manual_seed(0)
    grad, rows = torch.randn(9, 17, generator=generator), torch.arange(9)
    damping = make_damping(9, 17, 3)
    step = RowStep(0.5, -0.25, bound, 0.1, True, bound, rounding_keys=rows)
    found = []
    for gradient in (
        RowGradient.of_rows(rows, grad, 9).damped(damping),
        RowGradient.of_rows(rows, damp_rows(grad, damping), 9),
    ):
        weight = torch.ones(9, 17, dtype=torch.bfloat16)
        first = torch.full((9, 17), 0.5) if has_first else None
        second = torch.ones(9)
        moment_update(weight, first, second, gradient, step, Moments(first_decay=0.9 if has_first else 0.0, eps=1e-3))
        found.append((weight.float(), second))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-2, atol=0)  # rounding may differ by one bit
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=0)


def test_a_damped_gradient_is_not_damped_again() -> None:
    gradient = RowGradient.of_rows(torch.arange(2), torch.ones(2, 3), 2).damped(make_damping(2, 3, 1))
    with pytest.raises(ValueError, match="the gradient is damped already"):
        gradient.damped(make_damping(2, 3, 1))
    with pytest.raises(ValueError, match="expected tables on cpu, got meta"):
        damp_rows(
            torch.ones(2, 3), make_damping(2, 3, 1)._replace(tables=torch.zeros(2, dtype=torch.int64, device="meta"))
        )


def test_a_table_without_directions_is_refused_and_nothing_is_updated(backend: str) -> None:
    if backend == "triton":
        pytest.skip("a GPU would have to wait to look")
    one = torch.ones(1)
    damping = Damping(torch.tensor([2]), one, one.view(1, 1), one.view(1, 1, 1))
    weight = torch.zeros(1, 1)
    gradient = RowGradient.of_rows(torch.tensor([0]), one.view(1, 1), 1).damped(damping)
    for second in (None, torch.ones(1)):
        with pytest.raises(IndexError, match=r"tables must lie in \[0, 1\), got 2 to 2"):
            moment_update(weight, None, second, gradient, RowStep(lr=1.0), Moments())
    assert float(weight) == 0


@pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_a_plain_loop(shape: tuple[int, ...], architecture: str) -> None:
    vectors, block = make(*shape)
    expected = torch.zeros(len(vectors), dtype=torch.float64)
    for centre in range(block.num_positions):
        around = [p for p in range(int(block.starts[centre]), int(block.stops[centre])) if p != centre]
        for target in block.targets[centre].tolist():
            share = 1 if architecture == "skipgram" or not around else 1 / len(around)
            for context in around:
                expected[block.inputs[context]] += share
                expected[target] += share
    found = count_of_rows(block, len(vectors), architecture)  # type: ignore[arg-type]
    # Shares of a prediction are counted in parts of 1,024.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0 if architecture == "skipgram" else 0.2)
