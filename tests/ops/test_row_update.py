"""The kernel of running moments: every implementation against the definition, on edge shapes."""

from __future__ import annotations

import math

import pytest
import torch

from embedtrain.ops._backend.mix import mix64
from embedtrain.ops.row_update import Moments, RowStep, reference, row_update
from tests.ops.updates import moment_update

STEPS = {
    "plain": RowStep(lr=0.1),
    "everything": RowStep(lr=0.1, grad_factor=-0.5, max_row_grad_norm=0.4, weight_decay=0.2, max_norm=1.1),
    "decoupled": RowStep(lr=0.1, weight_decay=0.2, decoupled_weight_decay=True),
}
MOMENTS = Moments(
    first_decay=0.8, first_correction=0.5, second_decay=0.9, second_gain=0.1, second_correction=0.7, eps=1e-3
)


def make(num_rows: int, dim: int, num_touched: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows * dim + num_touched)
    return {
        "weight": torch.randn(num_rows, dim, generator=generator),
        "element": torch.rand(num_rows, dim, generator=generator),
        "row": torch.rand(num_rows, generator=generator),
        "first": torch.randn(num_rows, dim, generator=generator),
        "rows": torch.randperm(num_rows, generator=generator)[:num_touched],
        "grad": torch.randn(num_touched, dim, generator=generator),
    }


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("num_rows", "dim", "num_touched"),
    [(1, 1, 1), (9, 3, 5), (300, 64, 200), (40, 100, 30), (30, 129, 7), (5, 4, 0), (0, 4, 0)],
)
def test_equals_the_definition(backend: str, num_rows: int, dim: int, num_touched: int, step: str) -> None:
    torch.set_num_threads(2)
    for has_first in (False, True):
        for second in (None, "row", "element"):
            found, expected = make(num_rows, dim, num_touched), make(num_rows, dim, num_touched)
            for tensors, update in ((found, moment_update), (expected, reference.moment_update)):
                update(
                    tensors["weight"],
                    tensors["first"] if has_first else None,
                    None if second is None else tensors[second],
                    tensors["rows"],
                    tensors["grad"],
                    STEPS[step],
                    MOMENTS,
                )
            for name, tensor in found.items():
                # Sums over dim in another order, and fused multiplications: a few float32 roundings.
                torch.testing.assert_close(tensor, expected[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 3, 100, 129])
@pytest.mark.parametrize("second", [None, "row", "element"])
def test_bfloat16_rows_are_rounded_by_their_keys(backend: str, second: str | None, dim: int) -> None:
    found, expected = make(60, dim, 50), make(60, dim, 50)
    step = RowStep(lr=0.1, weight_decay=0.2, rounding_keys=mix64(torch.arange(50)))
    for tensors, update in ((found, moment_update), (expected, reference.moment_update)):
        tensors["weight"] = tensors["weight"].bfloat16()
        state = None if second is None else tensors[second]
        update(tensors["weight"], None, state, tensors["rows"], tensors["grad"], step, MOMENTS)
    # The last bit of a float32 value may differ, and then, rarely, its rounding.
    assert (found["weight"] == expected["weight"]).float().mean() > 0.98
    torch.testing.assert_close(found["weight"], expected["weight"], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("factor", [-0.5, 0.0, math.nan])
def test_a_factor_may_lie_on_the_device_where_nan_leaves_the_rows(backend: str, factor: float) -> None:
    found, expected = make(30, 5, 20), make(30, 5, 20)
    given, known = (RowStep(lr=0.1, grad_factor=value, weight_decay=0.2) for value in (torch.tensor(factor), factor))
    for tensors, step in ((found, given), (expected, known)):
        if step is given or factor == factor:
            touched = tensors["weight"], tensors["first"], tensors["element"], tensors["rows"], tensors["grad"]
            moment_update(*touched, step, MOMENTS)
    row_update(found["weight"], [], found["rows"], found["grad"], given, lambda grad, states: grad)
    if factor == factor:
        row_update(expected["weight"], [], expected["rows"], expected["grad"], known, lambda grad, states: grad)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("argument", ["first", "second", "state dtype", "rows", "grad", "keys"])
def test_disagreeing_arguments_are_refused(backend: str, argument: str) -> None:
    tensors = make(9, 3, 5)
    step = STEPS["plain"]
    if argument == "first":
        tensors["first"] = tensors["row"]
    elif argument == "second":
        tensors["element"] = tensors["element"][:, :2]
    elif argument == "state dtype":
        tensors["element"] = tensors["element"].double()
    elif argument == "rows":
        tensors["rows"] = tensors["rows"].int()
    elif argument == "grad":
        tensors["grad"] = tensors["grad"][:3]
    else:
        step = RowStep(lr=0.1, rounding_keys=mix64(torch.arange(5)))
    with pytest.raises(ValueError):
        moment_update(
            tensors["weight"],
            tensors["first"],
            tensors["element"],
            tensors["rows"],
            tensors["grad"],
            step,
            MOMENTS,
        )


def test_a_row_outside_the_table_is_an_index_error_or_left_out(backend: str) -> None:
    tensors = make(9, 3, 5)
    tensors["rows"][2] = 9
    if backend == "triton":
        expected = tensors["weight"].clone()
        kept = torch.tensor([0, 1, 3, 4])
        rows, grad = tensors["rows"][kept], tensors["grad"][kept]
        reference.moment_update(expected, None, None, rows, grad, STEPS["plain"], MOMENTS)
        moment_update(tensors["weight"], None, None, tensors["rows"], tensors["grad"], STEPS["plain"], MOMENTS)
        torch.testing.assert_close(tensors["weight"], expected)
        return
    with pytest.raises(IndexError):
        moment_update(tensors["weight"], None, None, tensors["rows"], tensors["grad"], STEPS["plain"], MOMENTS)


def test_a_formula_of_ones_own_is_given_the_touched_rows(backend: str) -> None:
    tensors = make(9, 3, 5)
    before = tensors["weight"].clone()

    def direction(grad: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        assert torch.equal(grad, tensors["grad"])
        states[0].add_(1)
        return grad.sign()

    state = tensors["row"].clone()
    row_update(tensors["weight"], [tensors["row"]], tensors["rows"], tensors["grad"], RowStep(lr=0.5), direction)
    moved = torch.zeros(9, 3)
    moved[tensors["rows"]] = 0.5 * tensors["grad"].sign()
    torch.testing.assert_close(tensors["weight"], before - moved)
    touched = torch.zeros(9)
    touched[tensors["rows"]] = 1
    torch.testing.assert_close(tensors["row"], state + touched)
