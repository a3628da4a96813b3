"""Every implementation against the formula in a plain Python loop."""

from __future__ import annotations

import math

import pytest
import torch

from embedtrain.ops._backend.mix import mix64
from embedtrain.ops._backend.stochastic_rounding import round_to_bfloat16
from embedtrain.ops.row_gradient import RowGradient
from tests.ops.updates import RowwiseAdagradStep, rowwise_adagrad

SETTINGS = [
    {"lr": 0.1, "eps": 1e-10},
    {"lr": 0.1, "eps": 0.5},
    {"lr": 0.3, "eps": 1e-6, "weight_decay": 0.2},
    {"lr": 0.3, "eps": 1e-6, "weight_decay": 0.2, "decoupled_weight_decay": True},
    {"lr": 0.3, "eps": 1e-6, "weight_decay": 0.2, "max_norm": 1.5},
]


def plain_loop(weight, accumulator, rows, grad, step: RowwiseAdagradStep):
    weight, accumulator = weight.tolist(), accumulator.tolist()
    for row, gradient in zip(rows.tolist(), grad.tolist(), strict=True):
        coupled = 0.0 if step.decoupled_weight_decay else step.weight_decay
        gradient = [g + coupled * w for g, w in zip(gradient, weight[row], strict=True)]
        mean_square = sum(g * g for g in gradient) / len(gradient)
        accumulator[row] += mean_square
        kept = 1.0 - step.lr * step.weight_decay if step.decoupled_weight_decay else 1.0
        rate = step.lr / (math.sqrt(accumulator[row]) + step.eps)
        new = [kept * w - rate * g for w, g in zip(weight[row], gradient, strict=True)]
        shrink = (
            step.max_norm / max(step.max_norm, math.sqrt(sum(w * w for w in new))) if step.max_norm < math.inf else 1
        )
        weight[row] = [shrink * w for w in new]
    return torch.tensor(weight), torch.tensor(accumulator)


def make(num_rows: int, dim: int, num_touched: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows * dim + num_touched)
    weight = torch.randn(num_rows, dim, generator=generator)
    accumulator = torch.rand(num_rows, generator=generator)
    rows = torch.randperm(num_rows, generator=generator)[:num_touched]
    return weight, accumulator, rows, torch.randn(num_touched, dim, generator=generator)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(
    ("num_rows", "dim", "num_touched"), [(1, 1, 1), (9, 3, 5), (40, 100, 40), (30, 129, 7), (5, 4, 0)]
)
def test_equals_a_plain_loop(backend: str, num_rows: int, dim: int, num_touched: int, settings: dict) -> None:
    weight, accumulator, rows, grad = make(num_rows, dim, num_touched)
    expected = plain_loop(weight, accumulator, rows, grad, RowwiseAdagradStep(**settings))
    rowwise_adagrad(weight, accumulator, RowGradient.of_rows(rows, grad, num_rows), RowwiseAdagradStep(**settings))
    # Python computes in float64: what is left is the rounding of float32 sums over dim.
    torch.testing.assert_close(weight, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(accumulator, expected[1], rtol=1e-5, atol=1e-6)


def test_untouched_rows_keep_every_bit(backend: str) -> None:
    weight, accumulator, rows, grad = make(20, 8, 6)
    before = weight.clone(), accumulator.clone()
    step = RowwiseAdagradStep(lr=0.1, eps=1e-8, weight_decay=0.1)
    rowwise_adagrad(weight, accumulator, RowGradient.of_rows(rows, grad, 20), step)
    untouched = torch.ones(20, dtype=torch.bool)
    untouched[rows] = False
    assert torch.equal(weight[untouched], before[0][untouched])
    assert torch.equal(accumulator[untouched], before[1][untouched])
    assert not torch.equal(weight[rows], before[0][rows])


@pytest.mark.parametrize("max_norm", [math.inf, 4.0])
def test_bfloat16_rows_round_alike_in_every_implementation(backend: str, max_norm: float) -> None:
    weight, accumulator, rows, grad = make(50, 24, 30)
    keys = mix64(torch.arange(30))
    stored, exact = weight.bfloat16(), weight.bfloat16().float()
    state = accumulator.clone()
    step = RowwiseAdagradStep(lr=0.1, eps=1e-8, rounding_keys=keys, max_norm=max_norm)
    gradient = RowGradient.of_rows(rows, grad, 50)
    rowwise_adagrad(stored, accumulator, gradient, step)
    rowwise_adagrad(exact, state, gradient, RowwiseAdagradStep(lr=0.1, eps=1e-8, max_norm=max_norm))
    expected = round_to_bfloat16(exact[rows], keys)
    # The last bit of a float32 sum may differ between implementations, and then, rarely, its rounding.
    assert (stored[rows] == expected).float().mean() > 0.99
    torch.testing.assert_close(stored[rows].float(), exact[rows], rtol=2**-7, atol=1e-6)


def test_stochastic_rounding_is_right_on_average_and_exact_where_it_can_be() -> None:
    value = torch.tensor([[1.0 + 2**-10]])  # an eighth of the way between two bfloat16 neighbours
    keys = torch.arange(20_000)
    rounded = round_to_bfloat16(value.expand(20_000, 1), keys).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(rounded.mean().item() - value.item()) < 5 * 2**-7 * math.sqrt(0.125 * 0.875 / 20_000)
    representable = torch.tensor([[1.5, -2.0, 0.0, float("inf")]])
    assert torch.equal(round_to_bfloat16(representable, torch.tensor([3])).float(), representable)


@pytest.mark.parametrize("argument", ["accumulator", "rows", "grad", "keys"])
def test_disagreeing_arguments_are_refused(backend: str, argument: str) -> None:
    weight, accumulator, rows, grad = make(9, 3, 5)
    keys = None
    if argument == "accumulator":
        accumulator = accumulator[:-1]
    elif argument == "rows":
        rows = rows.int()
    elif argument == "grad":
        grad = grad[:, :2]
    else:
        keys = rows
    with pytest.raises(ValueError):
        gradient = RowGradient.of_rows(rows, grad, 9)
        rowwise_adagrad(weight, accumulator, gradient, RowwiseAdagradStep(lr=0.1, eps=0.1, rounding_keys=keys))


def test_a_row_outside_the_table_is_an_index_error_or_left_out(backend: str) -> None:
    weight, accumulator, rows, grad = make(9, 3, 5)
    rows[2] = 9
    step = RowwiseAdagradStep(lr=0.1, eps=0.1)
    if backend == "triton":
        others = torch.tensor([0, 1, 3, 4])
        expected = plain_loop(weight, accumulator, rows[others], grad[others], step)
        rowwise_adagrad(weight, accumulator, RowGradient.of_rows(rows, grad, 9), step)
        torch.testing.assert_close(weight, expected[0], rtol=1e-5, atol=1e-6)
        return
    with pytest.raises(IndexError):
        rowwise_adagrad(weight, accumulator, RowGradient.of_rows(rows, grad, 9), step)
