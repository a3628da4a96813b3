"""What the optimizers refuse, and how they share a collection."""

from __future__ import annotations

import math

import pytest
import torch

import embedtrain as et


def one_table(dim: int = 2) -> et.EmbeddingCollection:
    return et.EmbeddingCollection([et.TableSpec("t", 6, dim, init="normal", init_scale=1.0)])


def two_kinds() -> et.EmbeddingCollection:
    return et.EmbeddingCollection(
        [et.TableSpec("t", 6, 3, optimizer="slow"), et.TableSpec("u", 4, 3), et.TableSpec("v", 5, 3)]
    )


def backward(tables: et.EmbeddingCollection, factors: dict[str, float]) -> None:
    out = tables({name: et.Jagged.from_ids(torch.tensor([1, 2])) for name in factors})
    sum(factor * out[name].sum() for name, factor in factors.items()).backward()


@pytest.mark.parametrize("name", et.optim.OPTIMIZERS)
@pytest.mark.parametrize("option", ["momentum", "amsgrad", "eps_inside_root"])
def test_an_option_that_an_optimizer_does_not_have_is_refused_by_name(name: str, option: str) -> None:
    with pytest.raises(TypeError, match=rf"does not take {option}; it takes lr, .*max_norm"):
        et.optim.OPTIMIZERS[name](one_table(), **{option: 0.5})


@pytest.mark.parametrize("option", ["eps", "betas", "alpha", "lr_decay", "accumulator_decay"])
def test_nor_does_it_take_another_formulas(option: str) -> None:
    with pytest.raises(TypeError, match=f"SGD does not take {option}"):
        et.optim.SGD(one_table(), **{option: 0.5})


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (et.optim.Adam, {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\)"),
        (et.optim.Adam, {"betas": (0.9,)}, "betas must be two numbers"),
        (et.optim.RMSprop, {"alpha": -0.1}, "alpha must be in"),
        (et.optim.RowwiseAdagrad, {"accumulator_decay": 1.0}, "accumulator_decay must be in"),
        (et.optim.SGD, {"lr": math.inf}, "lr must be finite"),
        (et.optim.SGD, {"max_norm": 0.0}, "max_norm must be positive"),
        (et.optim.SGD, {"max_row_grad_norm": -1.0}, "max_row_grad_norm must be positive"),
    ],
)
def test_hyperparameters_out_of_range_are_refused(optimizer: type, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(one_table(), **options)


def test_a_subclass_without_a_formula_says_what_to_define() -> None:
    class Unfinished(et.optim.SparseOptimizer):
        pass

    tables = one_table()
    optimizer = Unfinished(tables, {"lr": 0.1})
    backward(tables, {"t": 1.0})
    with pytest.raises(NotImplementedError, match="Unfinished has no formula: define direction"):
        optimizer.step()


def test_tables_of_one_collection_can_have_different_optimizers() -> None:
    tables = two_kinds()
    optimizer = et.optim.Combined(
        et.optim.SGD(tables.trained_by("slow"), lr=0.5), et.optim.Adagrad(tables.trained_by("default"), lr=0.1)
    )
    assert [settings["tables"] for settings in optimizer.param_groups] == [["t"], ["u", "v"]]
    assert set(tables.shards["t"].state) == set()
    assert set(tables.shards["v"].state) == {"accumulator"}
    before = {name: tables.gather_table(name).clone() for name in "tuv"}
    backward(tables, {"t": 2.0, "u": 3.0, "v": 4.0})
    optimizer.step()
    torch.testing.assert_close(before["t"][1] - tables.gather_table("t")[1], torch.full((3,), 1.0))
    for name in "uv":
        torch.testing.assert_close(before[name][1] - tables.gather_table(name)[1], torch.full((3,), 0.1))


def test_combined_optimizers_step_together_or_not_at_all() -> None:
    tables = two_kinds()
    optimizer = et.optim.Combined(
        et.optim.SGD(tables.trained_by("slow"), lr=0.5), et.optim.SGD(tables.trained_by("default"), lr=0.5)
    )
    before = tables.gather_table("t").clone()
    backward(tables, {"t": 1.0, "u": math.nan, "v": 1.0})
    with pytest.raises(et.NonFiniteError, match="table 'u', row 1"):
        optimizer.step()
    assert torch.equal(tables.gather_table("t"), before)


def test_their_gradients_have_one_global_norm() -> None:
    tables = two_kinds()
    optimizer = et.optim.Combined(
        et.optim.SGD(tables.trained_by("slow"), lr=1.0),
        et.optim.SGD(tables.trained_by("default"), lr=1.0),
        max_grad_norm=1.0,
    )
    before = {name: tables.gather_table(name).clone() for name in "tu"}
    backward(tables, {"t": 3.0, "u": 4.0})
    optimizer.step()
    norm = math.sqrt(6 * 9 + 6 * 16)
    for name, factor in (("t", 3.0), ("u", 4.0)):
        torch.testing.assert_close(before[name][1] - tables.gather_table(name)[1], torch.full((3,), factor / norm))


def test_combined_optimizers_go_through_state_dicts_and_schedulers() -> None:
    tables = two_kinds()

    def make(tables: et.EmbeddingCollection) -> et.optim.Combined:
        return et.optim.Combined(
            et.optim.SGD(tables.trained_by("slow"), lr=0.5), et.optim.Adam(tables.trained_by("default"), lr=0.1)
        )

    optimizer = make(tables)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.5**step, lambda step: 1.0])
    backward(tables, {"t": 1.0, "u": 1.0})
    optimizer.step()
    scheduler.step()
    assert [settings["lr"] for settings in optimizer.param_groups] == [0.25, 0.1]
    copy = make(two_kinds())
    copy.load_state_dict(optimizer.state_dict())
    assert [(s["lr"], s["step"]) for s in copy.param_groups] == [(0.25, 1), (0.1, 1)]
    assert copy.name == "SGD+Adam"


@pytest.mark.parametrize("options", [{"max_grad_norm": 1.0}, {"nonfinite": "skip"}])
def test_what_is_for_all_tables_is_given_to_combined(options: dict) -> None:
    tables = two_kinds()
    with pytest.raises(ValueError, match="pass them to Combined"):
        et.optim.Combined(et.optim.SGD(tables.trained_by("slow"), **options))


def test_a_table_has_one_optimizer() -> None:
    tables = two_kinds()
    with pytest.raises(ValueError, match="more than one optimizer has the tables u, v"):
        same = et.optim.SGD(tables.trained_by("default"))
        et.optim.Combined(same, same)
    with pytest.raises(ValueError, match="no table is trained by 'fast'; the names are 'slow', 'default'"):
        tables.trained_by("fast")


@pytest.mark.parametrize("name", et.optim.OPTIMIZERS)
def test_reset_state_starts_anew(name: str) -> None:
    tables = one_table()
    optimizer = et.optim.OPTIMIZERS[name](tables, lr=0.1)
    first = {kind: tensor.clone() for kind, tensor in tables.shards["t"].state.items()}
    backward(tables, {"t": 1.0})
    optimizer.step()
    assert all(not torch.equal(tensor, first[kind]) for kind, tensor in tables.shards["t"].state.items())
    optimizer.reset_state()
    assert optimizer.param_groups[0]["step"] == 0
    assert all(torch.equal(tensor, first[kind]) for kind, tensor in tables.shards["t"].state.items())
