"""The update by running moments: every implementation against the formula in float64, row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from embedtrain.ops.mix import mix64
from embedtrain.ops.reference.stochastic_rounding import round_to_bfloat16
from embedtrain.ops.row_update import Moments, RowStep, moment_update

MOMENTS = Moments(
    first_decay=0.9, first_correction=0.4, second_decay=0.8, second_gain=0.2, second_correction=0.7, eps=1e-6
)
STEPS = [
    RowStep(lr=0.1),
    RowStep(lr=0.3, grad_factor=-0.5, weight_decay=0.2),
    RowStep(lr=0.3, weight_decay=0.2, decoupled_weight_decay=True),
    RowStep(lr=0.1, max_row_grad_norm=0.7, max_norm=1.1),
]


def clipped(values: Tensor, bound: float) -> Tensor:
    norm = float(values.norm())
    return values * (bound / norm) if norm > bound else values


def plain_row(
    row: Tensor, first: Tensor | None, second: Tensor | None, grad: Tensor, step: RowStep, m: Moments
) -> None:
    """Updates one row in place, in float64."""
    grad = clipped(grad * step.grad_factor, step.max_row_grad_norm) + step.coupled_decay * row
    taken = grad
    if first is not None:
        first.copy_(m.first_decay * first + (1 - m.first_decay) * grad)
        taken = first
    taken = step.lr / m.first_correction * taken
    if second is not None:
        squares = grad.square() if second.dim() else grad.square().mean()
        second.copy_(m.second_decay * second + m.second_gain * squares)
        taken = taken / (second.sqrt() / m.second_correction + m.eps)
    row.copy_(clipped(step.row_factor * row - taken, step.max_norm))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("second_kind", ["none", "row", "element"])
@pytest.mark.parametrize("has_first", [False, True])
@pytest.mark.parametrize(("dim", "num_touched"), [(1, 1), (3, 5), (100, 7), (129, 40), (4, 0)])
def test_equals_the_formula_in_float64(
    backend: str, dim: int, num_touched: int, has_first: bool, second_kind: str, step: RowStep
) -> None:
    generator = torch.Generator().manual_seed(dim)
    weight, first, elements, grad = torch.randn(4, 40, dim, generator=generator)
    rows = torch.randperm(40, generator=generator)[:num_touched]
    kinds = {"none": None, "row": elements[:, 0].abs(), "element": elements.abs()}
    given = [weight, first if has_first else None, kinds[second_kind]]
    exact = [None if tensor is None else tensor.double() for tensor in given]
    given = [None if tensor is None else tensor.clone() for tensor in given]
    for place, row in enumerate(rows.tolist()):
        parts = [None if tensor is None else tensor[row] for tensor in exact]
        plain_row(*parts, grad[place].double(), step, MOMENTS)
    moment_update(*given, rows, grad[:num_touched].contiguous(), step, MOMENTS)
    for tensor, expected in zip(given, exact, strict=True):
        if tensor is not None:
            torch.testing.assert_close(tensor.double(), expected, rtol=2e-5, atol=2e-6)


def test_bfloat16_rows_round_alike_in_every_implementation(backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weight, grad = torch.randn(2, 30, 24, generator=generator)
    keys, rows = mix64(torch.arange(30)), torch.arange(30)
    stored, exact = weight.bfloat16(), weight.bfloat16().float()
    moment_update(stored, None, None, rows, grad, RowStep(lr=0.1, rounding_keys=keys, max_norm=math.inf), Moments())
    moment_update(exact, None, None, rows, grad, RowStep(lr=0.1), Moments())
    # The last bit of a float32 value may differ between implementations, and then, rarely, its rounding.
    assert (stored == round_to_bfloat16(exact, keys)).float().mean() > 0.99
