from __future__ import annotations

import math

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import embedtrain as et


def look_up(tables: et.EmbeddingCollection, ids: list[int]) -> torch.Tensor:
    return tables({"t": et.Jagged.from_ids(torch.tensor(ids))})["t"]


def make(dim: int = 1, num_rows: int = 6, **options) -> tuple[et.EmbeddingCollection, et.optim.RowwiseAdagrad]:
    tables = et.EmbeddingCollection([et.TableSpec("t", num_rows, dim, init="normal", init_scale=1.0)])
    return tables, et.optim.RowwiseAdagrad(tables, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr_decay": 0.3},
        {"weight_decay": 0.2},
        {"initial_accumulator_value": 0.7},
        {"eps": 0.1},
        {"lr_decay": 0.3, "weight_decay": 0.2, "initial_accumulator_value": 0.7, "eps": 0.1},
    ],
)
def test_equals_torch_adagrad_where_a_row_is_one_number(options: dict) -> None:
    tables, optimizer = make(lr=0.3, **options)
    weight = tables.gather_table("t").clone().requires_grad_()
    peer = torch.optim.Adagrad([weight], lr=0.3, **options)
    for step in range(8):
        factors = torch.linspace(-1, 2, 6).unsqueeze(1) + 0.1 * step
        ((look_up(tables, list(range(6))) - factors) ** 3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ((weight - factors) ** 3).sum().backward()
        peer.step()
        peer.zero_grad()
    torch.testing.assert_close(tables.gather_table("t"), weight.detach(), rtol=1e-5, atol=1e-6)


def test_duplicates_are_summed_before_squaring() -> None:
    tables, optimizer = make(dim=2, lr=0.1)
    look_up(tables, [3, 3, 3]).sum().backward()
    optimizer.step()
    # Three ones summed are 3, squared 9; squared first they would be 3.
    assert tables.gather_table("t", "accumulator")[3] == 9.0


def test_hooks_of_steps_are_called_as_torch_does() -> None:
    (first_tables, first), (second_tables, second) = make(lr=0.1), make(lr=0.1)
    seen: list[str] = []
    handles = [
        first.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append(f"before {optimizer is first}")),
        first.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(f"after {optimizer is first}")),
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: seen.append("any")),
    ]
    for tables, optimizer in ((first_tables, first), (second_tables, second)):
        look_up(tables, [1]).sum().backward()
        optimizer.step()
    assert seen == ["before True", "after True", "any", "any"]
    assert torch.equal(first_tables.gather_table("t"), second_tables.gather_table("t"))
    for handle in handles:
        handle.remove()
    first.step()
    assert len(seen) == 4


def test_a_profile_shows_the_step() -> None:
    tables, optimizer = make(lr=0.1)
    look_up(tables, [1]).sum().backward()
    with torch.profiler.profile() as profile:
        optimizer.step()
    assert "Optimizer.step#RowwiseAdagrad.step" in [event.key for event in profile.key_averages()]


def test_decoupled_decay_leaves_the_accumulator_alone() -> None:
    tables, optimizer = make(dim=3, lr=0.1, weight_decay=0.5, decoupled_weight_decay=True)
    before = tables.gather_table("t").clone()
    look_up(tables, [1]).sum().backward()
    optimizer.step()
    after = tables.gather_table("t")
    assert tables.gather_table("t", "accumulator")[1] == 1.0
    torch.testing.assert_close(after[1], before[1] * (1 - 0.1 * 0.5) - 0.1)
    assert torch.equal(after[0], before[0])


def test_max_grad_norm_bounds_the_norm_over_all_tables() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("t", 6, 3), et.TableSpec("u", 4, 2)])
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1, max_grad_norm=1.0)
    out = tables({name: et.Jagged.from_ids(torch.tensor([1, 2])) for name in ("t", "u")})
    (3 * out["t"].sum() + 4 * out["u"].sum()).backward()
    optimizer.step()
    norm = math.sqrt(6 * 9 + 4 * 16)
    torch.testing.assert_close(tables.gather_table("t", "accumulator")[1], torch.tensor((3 / norm) ** 2))
    torch.testing.assert_close(tables.gather_table("u", "accumulator")[1], torch.tensor((4 / norm) ** 2))


def test_a_gradient_below_the_bound_is_left_alone() -> None:
    tables, optimizer = make(dim=1, lr=0.1, max_grad_norm=10.0)
    look_up(tables, [1]).sum().backward()
    optimizer.step()
    assert tables.gather_table("t", "accumulator")[1] == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_is_applied(bad: float) -> None:
    tables, optimizer = make(dim=2, lr=0.1)
    before = tables.gather_table("t").clone()
    (look_up(tables, [1, 4]) * torch.tensor([[1.0], [bad]])).sum().backward()
    with pytest.raises(et.NonFiniteError, match=r"step 1: the gradient of table 't', row 4 is not finite, on rank 0"):
        optimizer.step()
    assert torch.equal(tables.gather_table("t"), before)
    assert not tables.gather_table("t", "accumulator").any()


def test_such_steps_can_be_skipped_and_are_counted() -> None:
    tables, optimizer = make(dim=2, lr=0.1, nonfinite="skip")
    before = tables.gather_table("t").clone()
    (look_up(tables, [1]) * float("nan")).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.num_skipped == 1
    assert torch.equal(tables.gather_table("t"), before)
    look_up(tables, [1]).sum().backward()
    optimizer.step()
    assert not torch.equal(tables.gather_table("t"), before)
    assert optimizer.param_groups[0]["step"] == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_looked_at_later_is_refused_at_the_next_step(bad: float) -> None:
    tables, optimizer = make(dim=2, lr=0.1)
    optimizer.looks_later = True
    before = tables.gather_table("t").clone()
    (look_up(tables, [1, 4]) * torch.tensor([[1.0], [bad]])).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    look_up(tables, [1]).sum().backward()
    optimizer.watch(torch.tensor(2.0))
    with pytest.raises(et.NonFiniteError, match=r"step 1: the gradient of table 't', row 4 is not finite, on rank 0"):
        optimizer.step()
    assert torch.equal(tables.gather_table("t"), before)
    assert not tables.gather_table("t", "accumulator").any()


def test_steps_that_are_looked_at_later_can_be_skipped() -> None:
    tables, optimizer = make(dim=2, lr=0.1, nonfinite="skip", lr_decay=1.0)
    optimizer.looks_later = True
    expected_tables, expected = make(dim=2, lr=0.1, lr_decay=1.0)
    for factor in (1.0, float("nan"), 2.0):
        (look_up(tables, [1, 2]) * factor).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if factor == factor:
            (look_up(expected_tables, [1, 2]) * factor).sum().backward()
            expected.step()
            expected.zero_grad()
    optimizer.settle()
    assert (optimizer.num_skipped, optimizer.param_groups[0]["step"]) == (1, 2)
    torch.testing.assert_close(tables.gather_table("t"), expected_tables.gather_table("t"))


def test_a_vetoed_step_is_refused_for_its_reason() -> None:
    tables, optimizer = make()
    look_up(tables, [1]).sum().backward()
    optimizer.veto("the loss is nan")
    with pytest.raises(et.NonFiniteError, match="the loss is nan"):
        optimizer.step()


def test_torch_schedulers_set_the_rate() -> None:
    tables, optimizer = make(lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    moved = []
    for _ in range(2):
        before = tables.gather_table("t")[1].clone()
        for group in tables.table_groups:
            group.state["accumulator"].zero_()
        look_up(tables, [1]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        moved.append((before - tables.gather_table("t")[1]).item())
    assert moved == pytest.approx([1.0, 0.5])


def test_step_keeps_gradients_until_zero_grad_as_torch_does() -> None:
    tables, optimizer = make(dim=1, lr=0.1)
    look_up(tables, [1]).sum().backward()
    optimizer.step()
    optimizer.step()
    assert tables.gather_table("t", "accumulator")[1] == 2.0
    optimizer.zero_grad()
    optimizer.step()
    assert tables.gather_table("t", "accumulator")[1] == 2.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative"),
        ({"eps": float("nan")}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive"),
        ({"nonfinite": "ignore"}, "nonfinite must be"),
    ],
)
def test_impossible_hyperparameters_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
