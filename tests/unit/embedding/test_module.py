"""A collection is a module of torch: what a user of torch does with one works, or is refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.testing.threads import run_threads


class Scored(et.EmbeddingCollection):
    """Tables with parameters, buffers and modules of their own."""

    def __init__(self, **options: object) -> None:
        super().__init__([et.TableSpec("item", 10, 4), et.TableSpec("item.tag", 5, 2)], **options)
        self.mlp = nn.Linear(4, 1)
        self.bias = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1))


def trained(model: et.EmbeddingCollection) -> et.optim.SparseOptimizer:
    optimizer = et.optim.RowwiseAdagrad(model, lr=0.1)
    model({"item": torch.tensor([1, 2])})["item"].sum().backward()
    optimizer.step()
    return optimizer


def test_a_subclass_saves_and_loads_its_own_parameters_and_modules() -> None:
    model, other = Scored(seed=1), Scored(seed=2)
    optimizer, other_optimizer = trained(model), et.optim.RowwiseAdagrad(other, lr=0.1)
    state_dict = {name: entry.clone() for name, entry in model.state_dict().items()}
    assert {"bias", "seen", "mlp.weight", "item.weight", "item.accumulator", "item.step", "item.tag.weight"} <= set(
        state_dict
    )
    nested = nn.ModuleDict({"inner": other})
    missing = nested.load_state_dict({f"inner.{name}": entry for name, entry in state_dict.items()}, strict=True)
    assert not missing.missing_keys
    for name, entry in other.state_dict().items():
        assert torch.equal(entry, state_dict[name]), name
    assert other_optimizer.param_groups[0]["step"] == optimizer.param_groups[0]["step"] == 1
    with pytest.raises(RuntimeError, match=r'(?s)Missing key.*"bias".*Unexpected key.*"item\.other"'):
        other.load_state_dict({("item.other" if name == "bias" else name): entry for name, entry in state_dict.items()})


def test_a_module_that_is_called_as_a_table_is_refused_when_it_is_saved() -> None:
    model = et.EmbeddingCollection([et.TableSpec("item", 10, 4)])
    model.item = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"both have the entry 'item\.weight'"):
        nn.ModuleDict({"tables": model}).state_dict()


def test_an_entry_of_a_state_dict_shares_memory_with_its_rows_and_with_nothing_else() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("small", 5, 4), et.TableSpec("large", 1000, 4)])
    entry = tables.state_dict()["small.weight"]
    assert entry.untyped_storage().nbytes() == 5 * 4 * 4
    entry.fill_(7.0)
    assert (tables.gather_table("small") == 7).all()


def test_counts_of_steps_that_contradict_each_other_are_refused() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("a", 3, 2), et.TableSpec("b", 3, 2)])
    optimizer = et.optim.SGD(tables)
    state_dict = tables.state_dict()
    state_dict["b.step"] = torch.tensor(4)
    with pytest.raises(RuntimeError, match=r"b\.step: 4 steps, but 0 for another table with the same optimizer"):
        tables.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["tables"] == ["a", "b"]


def test_to_moves_what_it_can_and_refuses_another_dtype() -> None:
    model = Scored()
    rows = model.gather_table("item").clone()
    assert model.to("cpu").float() is model
    for convert in (nn.Module.half, nn.Module.double, nn.Module.bfloat16, lambda m: m.to(torch.float16)):
        with pytest.raises(ValueError, match=r"the rows of item are stored as torch.float32.*TableSpec\(dtype="):
            convert(model)
    with pytest.raises(ValueError, match="cannot live on the meta device"):
        model.to("meta")
    assert torch.equal(model.gather_table("item"), rows)
    assert model.mlp.weight.dtype == torch.float32
    small = et.EmbeddingCollection([et.TableSpec("item", 10, 4, dtype=torch.bfloat16)])
    assert small.bfloat16().gather_table("item").dtype == torch.bfloat16


def test_rows_that_are_there_do_not_move() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], device="cpu:0")
    weight = tables.table_groups[0].weight
    assert tables.to("cpu").table_groups[0].weight is weight


def test_rows_that_move_keep_their_optimizer_and_their_gradients() -> None:
    """As to another device, of which there is none here."""
    moved, stayed = (et.EmbeddingCollection([et.TableSpec("item", 10, 4)], seed=1) for _ in range(2))
    optimizers = [trained(moved), trained(stayed)]
    moved.table_groups[0].move(torch.device("cpu"))
    for tables, optimizer in zip((moved, stayed), optimizers, strict=True):
        optimizer.zero_grad()
        tables({"item": torch.tensor([1, 2])})["item"].square().sum().backward()
        if tables is moved:
            moved.table_groups[0].move(torch.device("cpu"))  # between backward and step
        optimizer.step()
    for kind in ("weight", "accumulator"):
        assert torch.equal(moved.gather_table("item", kind), stayed.gather_table("item", kind))


def test_its_repr_lists_the_tables() -> None:
    tables = et.EmbeddingCollection(
        [et.TableSpec("item", 10_000, 4), et.TableSpec("word", 5, 3, dtype=torch.bfloat16, optimizer="slow")],
        [et.FeatureSpec("seen", "item"), et.FeatureSpec("bought", "item")],
    )
    text = repr(nn.Sequential(tables))
    assert "(item): 10,000 rows of 4 float32, trained by 'default', features seen, bought" in text
    assert "(word): 5 rows of 3 bfloat16, trained by 'slow', features none" in text


def test_tensors_of_ids_are_looked_up() -> None:
    features = [et.FeatureSpec("item"), et.FeatureSpec("bag", "item", pooling="sum")]
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], features)
    table = tables.gather_table("item")
    ids = torch.tensor([[1, 2, 3], [4, 4, 9]], dtype=torch.int32)
    out = tables({"item": ids, "bag": ids})
    assert torch.equal(out["item"], table[ids.long()])
    torch.testing.assert_close(out["bag"], table[ids.long()].sum(dim=1))
    assert torch.equal(tables.look_up(tables.ask({"item": ids}))["item"], out["item"]), "as forward"
    flat = tables({"item": ids[0], "bag": et.Jagged.from_ids(ids)})
    assert torch.equal(flat["item"], table[ids[0].long()])
    assert torch.equal(flat["bag"], out["bag"])
    assert tables({"item": torch.zeros(0, 3, dtype=torch.int64)})["item"].shape == (0, 3, 4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.tensor([1]), "expected a batch that has ids per feature, such as {'item': ids}, got Tensor"),
        ({"item": [1, 2]}, "feature 'item': expected a Jagged or a tensor of ids, got list"),
        ({"item": torch.tensor([1.0])}, r"expected ids \[n\] or \[n, k\], int64 or int32, got torch.float32 \(1,\)"),
        ({"item": torch.zeros(1, 1, 1, dtype=torch.int64)}, r"got torch.int64 \(1, 1, 1\)"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_no_batch_is_named_on_every_rank(batch: object, message: str, world_size: int) -> None:
    def look_up(ranks: Ranks) -> None:
        tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)], ranks=ranks)
        good = {"item": torch.tensor([1])}
        with pytest.raises((ValueError, RuntimeError), match=message):
            tables(batch if ranks.rank == ranks.size - 1 else good)
        assert tables(good)["item"].shape == (1, 4)

    run_threads(world_size, look_up)


@pytest.mark.parametrize(("world_size", "rows"), [(1, np.array([7, 3])), (3, torch.tensor([7, 3]))])
def test_rows_start_from_an_array(world_size: int, rows: torch.Tensor | np.ndarray) -> None:
    values = np.arange(44, dtype=np.float64).reshape(11, 4)

    def start(ranks: Ranks) -> tuple[torch.Tensor, torch.Tensor, list[et.InitCounts]]:
        tables = et.EmbeddingCollection([et.TableSpec("item", 11, 4), et.TableSpec("word", 11, 4)], ranks=ranks)
        counts = [
            et.init_from(tables, "item", values),
            et.init_from(tables, "word", torch.from_numpy(values[:2]).float(), rows),
        ]
        return tables.gather_table("item"), tables.gather_table("word"), counts

    fresh = et.EmbeddingCollection([et.TableSpec("word", 11, 4)]).gather_table("word")
    for item, word, counts in run_threads(world_size, start):
        assert torch.equal(item, torch.from_numpy(values).float())
        assert torch.equal(word[[7, 3]], item[:2])
        others = [row for row in range(11) if row not in (3, 7)]
        assert torch.equal(word[others], fresh[others])
        assert counts == [et.InitCounts(11, 11, 11), et.InitCounts(2, 11, 2)]


@pytest.mark.parametrize(
    ("table", "source", "rows", "message"),
    [
        ("items", np.zeros((10, 4)), None, "there is no table 'items'; the tables are item"),
        ("item", np.zeros((9, 4)), None, r"expected an array \[10, 4\], got \[9, 4\]"),
        ("item", np.zeros((2, 5)), torch.tensor([1, 2]), r"expected an array \[n, 4\], got \[2, 5\]"),
        ("item", np.full((10, 4), np.nan), None, "vector 0 of the array has a value that is not finite"),
        ("item", np.full((10, 4), 1e300), None, "vector 0 of the array has a value that is not finite in .* float32"),
        ("item", torch.full((10, 4), -1e300, dtype=torch.float64), None, "not finite in the table's float32"),
        ("item", np.zeros((10, 4), np.complex64), None, "the array must have real numbers, got complex64"),
        ("item", torch.zeros(10, 4, dtype=torch.complex64), None, "the array must have real numbers, got torch.compl"),
        ("item", np.zeros((10, 4), bool), None, "the array must have real numbers, got bool"),
        ("item", np.full((10, 4), "1"), None, "the array must have real numbers, got <U1"),
        ("item", [[1.0] * 4, [1.0] * 3], [1, 2], "the array must be an array of numbers"),
        ("item", None, None, r"expected an array \[10, 4\], got \[\]"),
        ("item", torch.zeros(10, 4).to_sparse(), None, "the array must be dense"),
        ("item", np.zeros((2, 4)), ["1", "2"], "rows must have real numbers"),
        ("item", np.zeros((2, 4)), [1.0, 2.0], r"rows must be \[2\] int64"),
        (["item"], np.zeros((10, 4)), None, "there is no table"),
        ("item", np.zeros((2, 4)), torch.tensor([1, 10]), "rows of table 'item' must be 0 to 9, got 1 to 10"),
        ("item", np.zeros((2, 4)), torch.tensor([1, 1]), "rows must be distinct"),
        ("item", np.zeros((2, 4)), torch.tensor([1]), r"rows must be \[2\] int64, one per vector"),
        ("item", np.zeros((2, 4)), {"a": 1}, "rows must be the row of each name for a file"),
        ("item", "vectors.txt", None, "rows must be the row of each name for a file"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(table: str, source: object, rows: object, message: str) -> None:
    tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)])
    with pytest.raises(et.UserError, match=message):
        et.init_from(tables, table, source, rows)


@pytest.mark.parametrize(
    "convert",
    [
        lambda values: values.tolist(),
        lambda values: values.astype(">f4"),
        lambda values: values.astype(">i2"),
        lambda values: values.astype(np.longdouble),
        lambda values: values.astype(np.float16),
        lambda values: values[::-1].copy()[::-1],
        lambda values: np.asfortranarray(values),
        lambda values: torch.from_numpy(values).T.contiguous().T.requires_grad_(),
    ],
)
@pytest.mark.parametrize("rows", [[7, 3], np.array([7, 3], ">i8"), np.array([3, 7])[::-1]])
def test_an_array_may_be_lists_or_lie_in_memory_as_it_likes(convert: Callable[[Any], Any], rows: Any) -> None:
    values = np.arange(8, dtype=np.float64).reshape(2, 4)
    tables = et.EmbeddingCollection([et.TableSpec("item", 11, 4)])
    et.init_from(tables, "item", convert(values), rows)
    assert torch.equal(tables.gather_table("item")[[7, 3]], torch.from_numpy(values).float())


def test_values_too_large_for_bfloat16_are_refused() -> None:
    tables = et.EmbeddingCollection([et.TableSpec("item", 2, 1, dtype=torch.bfloat16)])
    before = tables.gather_table("item").clone()
    with pytest.raises(et.UserError, match=r"vector 1 of the array .* is not finite in the table's bfloat16"):
        et.init_from(tables, "item", np.array([[1.0], [3.4e38]], np.float32))
    assert torch.equal(tables.gather_table("item"), before)


def test_an_array_that_is_refused_changes_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedtrain.embedding.init_from._BLOCK_BYTES", 16)
    tables = et.EmbeddingCollection([et.TableSpec("item", 3, 4)])
    before = tables.gather_table("item").clone()
    values = np.ones((3, 4))
    values[2, 1] = np.inf
    with pytest.raises(et.UserError, match="vector 2 of the array has a value that is not finite"):
        et.init_from(tables, "item", values)
    assert torch.equal(tables.gather_table("item"), before)


def test_first_values_and_steps_do_not_depend_on_the_default_dtype() -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            tables = et.EmbeddingCollection([et.TableSpec("item", 10, 4)])
            optimizer = trained(tables)
            optimizer.zero_grad()
            optimizer.step()
            results.append(tables.gather_table("item").clone())
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*results)
