"""What users of torch do with optimizers works with those of tables, or is refused with what to do instead."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import embedtrain as et


def make(kind: type[et.optim.SparseOptimizer] = et.optim.SGD, **options: Any) -> tuple[nn.ModuleDict, Any]:
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)])
    return nn.ModuleDict({"tables": tables, "linear": nn.Linear(4, 1)}), kind(tables, lr=1.0, **options)


def loss_of(model: nn.ModuleDict) -> torch.Tensor:
    return model["tables"]({"item": torch.tensor([1])})["item"].sum()


def row(model: nn.ModuleDict) -> torch.Tensor:
    return model["tables"].gather_table("item")[1].clone()


def test_a_closure_runs_forward_and_backward_and_its_loss_is_returned() -> None:
    model, optimizer = make()
    before = row(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    torch.testing.assert_close(loss, before.sum())
    assert torch.equal(row(model), before - 1)
    assert optimizer.step() is None


def test_gradients_that_are_applied_twice_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    """As by calling zero_grad of the model, which reaches parameters alone."""
    tables = et.EmbeddingCollection([et.TableSpec("twice", 10, 4)])
    model = nn.Sequential(tables)
    optimizer = et.optim.SGD(tables, lr=1.0)
    for zero_grad, expected in ((optimizer.zero_grad, 0), (tables.zero_grad, 0), (model.zero_grad, 1)):
        for _ in range(3):
            tables({"twice": torch.tensor([1])})["twice"].sum().backward()
            optimizer.step()
            zero_grad()
        texts = [record.message for record in caplog.records]
        assert len(texts) == expected
    assert (
        "of the tables twice are still there, and the next step applies them again: call optimizer.zero_grad()"
        in (texts[0])
    )


def test_no_parameter_group_is_added() -> None:
    _, optimizer = make(et.optim.Adam)
    with pytest.raises(ValueError, match=r"Adam has one parameter group per table group.*an optimizer of torch\.optim"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("unscales", [False, True])
def test_a_grad_scaler_is_refused_before_a_row_moves(unscales: bool) -> None:
    model, optimizer = make()
    before = row(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(model)).backward()
    if unscales:
        scaler.unscale_(optimizer)
    with pytest.raises(ValueError, match=r"takes no GradScaler.*autocast with bfloat16.*scaler\.get_scale\(\)"):
        scaler.step(optimizer)
    assert torch.equal(row(model), before)


def test_what_the_refusal_of_a_grad_scaler_advises_works() -> None:
    model, optimizer = make(nonfinite="skip")
    dense = torch.optim.SGD(model["linear"].parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = row(model)
    for factor in (1.0, math.inf):
        vectors = model["tables"]({"item": torch.tensor([1])})["item"]
        vectors.register_hook(lambda grad: grad / scaler.get_scale())
        loss = (vectors.sum() + model["linear"](vectors.detach()).sum()) * factor
        scaler.scale(loss).backward()
        scaler.step(dense)
        optimizer.step()
        scaler.update()
        optimizer.zero_grad()
        dense.zero_grad()
    assert torch.equal(row(model), before - 1)
    assert optimizer.num_skipped == 1


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (lambda model: model.parameters(), "got parameters"),
        (lambda model: list(model.parameters()), "got parameters"),
        (lambda model: model, "got ModuleDict: this ModuleDict has .tables"),
        (lambda model: torch.ones(2), "got Tensor"),
    ],
)
def test_what_is_no_tables_is_named_with_what_to_pass(given: Any, named: str) -> None:
    model, optimizer = make()
    del optimizer
    with pytest.raises(TypeError) as caught:
        et.optim.Adam(given(model), lr=0.1)
    assert named in str(caught.value)
    assert "Write et.optim.Adam(model.tables, ...)" in str(caught.value)


def test_a_state_dict_of_something_else_is_refused() -> None:
    _, optimizer = make(et.optim.Adagrad)
    _, other_kind = make(et.optim.Adam)
    with pytest.raises(ValueError, match=r"to Adam: it has \['initial_accumulator_value', 'lr_decay'\] and lacks"):
        other_kind.load_state_dict(optimizer.state_dict())
    tables = et.EmbeddingCollection([et.TableSpec("y", 4, 4), et.TableSpec("z", 4, 8)])
    other_tables = et.optim.Adagrad(tables)
    with pytest.raises(ValueError, match=r"has the groups \[\['item'\]\], not \[\['y'\], \['z'\]\]"):
        other_tables.load_state_dict(optimizer.state_dict())


def test_a_state_cannot_have_the_name_of_something_else() -> None:
    for name in ("weight", "step"):
        with pytest.raises(ValueError, match=f"cannot be called {name!r}"):
            et.optim.RowState(name)


def test_eps_of_adam_stands_where_torchs_adam_has_it() -> None:
    """And not where SparseAdam has it, whose steps are shorter if gradients are as small as eps."""
    for size in (1.0, 1e-3, 1e-5, 1e-6, 1e-7, 1e-8):
        tables = et.EmbeddingCollection([et.TableSpec("x", 2, 1, init="zeros")])
        optimizer = et.optim.Adam(tables, lr=1.0)
        dense = nn.Embedding(2, 1, _weight=torch.zeros(2, 1))
        peer = torch.optim.Adam(dense.parameters(), lr=1.0)
        (tables({"x": torch.tensor([0])})["x"] * size).sum().backward()
        (dense(torch.tensor([0])) * size).sum().backward()
        optimizer.step()
        peer.step()
        torch.testing.assert_close(tables.gather_table("x")[0], dense.weight[0].detach(), rtol=1e-6, atol=0)
