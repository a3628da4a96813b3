from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict

import embedtrain as et
from embedtrain import FeatureSpec, Jagged, TableSpec
from embedtrain.embedding.features import resolve_features


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "non-empty"),
        ({"name": "a/b"}, "without '/'"),
        ({"name": 5}, "a table's name must be a non-empty string without '/', got 5"),
        ({"num_rows": "3"}, "num_rows must be an integer, got '3'"),
        ({"dim": 2.5}, "dim must be an integer, got 2.5"),
        ({"dim": None}, "dim must be an integer, got None"),
        ({"num_rows": 0}, "at least 1"),
        ({"dim": 0}, "at least 1"),
        ({"dtype": torch.float16}, "float32 or bfloat16"),
        ({"init": "xavier"}, "must be one of"),
        ({"init_scale": -1.0}, ">= 0"),
    ],
)
def test_impossible_tables_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableSpec(**{"name": "item", "num_rows": 3, "dim": 2, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pooling": "max"}, "pooling must be one of"),
        ({"invalid_ids": "ignore"}, "invalid_ids must be one of"),
        ({"invalid_ids": "drop"}, "every id must give a vector"),
    ],
)
def test_impossible_features_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureSpec("clicked", **arguments)


def test_a_feature_of_a_table_that_does_not_exist_names_those_that_do() -> None:
    tables = [TableSpec("user", 3, 2), TableSpec("item", 3, 2)]
    with pytest.raises(ValueError, match=r"'clicked'.*'itme'.*user, item"):
        resolve_features(tables, [FeatureSpec("clicked", "itme")])


def test_a_feature_whose_name_is_no_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a feature's name must be a string, got 5"):
        FeatureSpec(5)


@pytest.mark.parametrize("other", ["a.weight", "a.step", "a.weight.b"])
def test_a_table_called_as_an_entry_of_another_is_refused(other: str) -> None:
    with pytest.raises(ValueError, match=f"'{other}' begins with a.*, the name of an entry of the table 'a'"):
        et.EmbeddingCollection([TableSpec(other, 3, 2), TableSpec("a", 3, 2)])


def test_a_table_called_as_the_state_of_another_is_refused_in_state_dicts() -> None:
    for names in (["a", "a.accumulator"], ["a.accumulator", "a"]):
        tables = et.EmbeddingCollection([TableSpec(name, 3, 2) for name in names])
        assert get_model_state_dict(tables).keys() == tables.state_dict().keys()
        et.optim.RowwiseAdagrad(tables, lr=0.1)
        with pytest.raises(ValueError, match=r"rename one of the tables"):
            get_model_state_dict(tables)


@pytest.mark.parametrize("kind", ["table", "feature"])
def test_repeated_names_are_refused(kind: str) -> None:
    tables = [TableSpec("item", 3, 2)] * (2 if kind == "table" else 1)
    features = [FeatureSpec("item")] * (2 if kind == "feature" else 1)
    with pytest.raises(ValueError, match=f"{kind} names must be unique, got item"):
        resolve_features(tables, features)


def test_without_features_each_table_is_one() -> None:
    assert list(resolve_features([TableSpec("user", 3, 2), TableSpec("item", 3, 2)], None)) == [
        "user",
        "item",
    ]


@pytest.mark.parametrize(
    ("values", "lengths", "weights", "message"),
    [
        ([[1]], [1], None, "one-dimensional"),
        ([1.0], [1], None, "int64 or int32"),
        ([1, 2], [1, 0], None, "add up to the 2 values, got 1"),
        ([1, 2], [3, -1], None, "negative"),
        ([1, 2], [2], [1.0], "shape of values"),
    ],
)
def test_inconsistent_bags_are_refused(values: list, lengths: list, weights: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Jagged(torch.tensor(values), torch.tensor(lengths), None if weights is None else torch.tensor(weights))


def test_bags_from_tensors() -> None:
    one_each = et.Jagged.from_ids(torch.tensor([3, 4]))
    assert one_each.lengths.tolist() == [1, 1]
    ids, weights = torch.tensor([[3, 4, 5], [6, 7, 8]]), torch.arange(6.0).view(2, 3)
    bags = et.Jagged.from_ids(ids, weights)
    assert (bags.values.tolist(), bags.lengths.tolist()) == ([3, 4, 5, 6, 7, 8], [3, 3])
    assert bags.weights.tolist() == [0, 1, 2, 3, 4, 5]
    empty = et.Jagged.from_ids(torch.zeros(2, 0, dtype=torch.int64))
    assert empty.lengths.tolist() == [0, 0]
    for bad in (torch.tensor(3), torch.zeros(1, 1, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"ids must be \[n\] or \[n, k\]"):
            et.Jagged.from_ids(bad)
    with pytest.raises(ValueError, match=r"weights must have the shape of ids, \(2, 3\), got \(6,\)"):
        et.Jagged.from_ids(ids, weights.flatten())


def test_bags_from_offsets_are_those_of_torchs_embedding_bag() -> None:
    values, table = torch.tensor([3, 4, 5, 1]), torch.randn(6, 2)
    features = [et.FeatureSpec("x", pooling="sum")]
    tables = et.EmbeddingCollection([et.TableSpec("x", 6, 2)], features)
    et.init_from(tables, "x", table)
    for offsets, is_last in (([0, 0, 3], False), ([0, 0, 3, 4], True), ([0, 0, 3, 4], False)):
        peer = torch.nn.EmbeddingBag.from_pretrained(table, mode="sum", include_last_offset=is_last)
        starts = torch.tensor(offsets, dtype=torch.int32)
        bags = et.Jagged.from_offsets(values.int(), starts, include_last_offset=is_last)
        torch.testing.assert_close(tables({"x": bags})["x"], peer(values, starts.long()))
    assert et.Jagged.from_offsets(values[:0], torch.zeros(0, dtype=torch.int64)).num_bags == 0


@pytest.mark.parametrize(
    ("offsets", "is_last", "message"),
    [
        ([1, 2], False, "offsets must go from 0 to the 4 values, got 1 to 4"),
        ([0, 2], True, "offsets must go from 0 to the 4 values, got 0 to 2"),
        ([0, 3, 1], False, "lengths must not be negative"),
        ([], True, r"offsets must be \[num_bags\]"),
        ([[0, 1]], False, r"offsets must be \[num_bags\]"),
    ],
)
def test_offsets_that_are_none_are_refused(offsets: list, is_last: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        et.Jagged.from_offsets(torch.arange(4), torch.tensor(offsets, dtype=torch.int64), include_last_offset=is_last)


@pytest.mark.parametrize(
    ("length", "num_bags", "message"), [(1, 3, "add up to the 4 values, got 3"), (-2, 2, "negative, got -2")]
)
def test_lengths_that_are_one_expanded_number_are_checked(length: int, num_bags: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        et.Jagged(torch.arange(4), torch.tensor(length).expand(num_bags))
    assert et.Jagged(torch.arange(4), torch.tensor(2).expand(2)).num_bags == 2


def test_bags_move_as_one() -> None:
    bags = et.Jagged.from_ids(torch.tensor([[3, 4]]), torch.ones(1, 2))
    moved = bags.to("meta")
    assert {part.device.type for part in (moved.values, moved.lengths, moved.weights)} == {"meta"}
    assert bags.to("cpu", non_blocking=True).values is bags.values
    assert et.Jagged.from_ids(torch.tensor([1])).to("meta").weights is None


def test_all_of_a_batch_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:  # which torch refuses on a machine without a GPU
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    bags = et.Jagged.from_ids(torch.tensor([[3, 4]]), torch.ones(1, 2)).pin_memory()
    assert {id(part) for part in (bags.values, bags.lengths, bags.weights)} == set(map(id, pinned))


@pytest.mark.parametrize(
    "bags",
    [[[1.9]], [[1], [2.0]], [[True]], [["1"]], [[None]], [[2**70]], [1, 2], [[[1], [2]]], [[1j]]],
)
def test_bags_of_what_is_no_integer_are_refused(bags: list) -> None:
    with pytest.raises(ValueError, match="expected a sequence of integers per bag"):
        Jagged.from_lists(bags)


def test_bags_of_any_integers() -> None:
    bags = Jagged.from_lists([np.array([1, 2], np.int32), torch.tensor([3]), (4,), range(5, 6)])
    assert bags.values.tolist() == [1, 2, 3, 4, 5]
    assert bags.values.dtype == torch.int64
    assert Jagged.from_lists([[], []]).values.dtype == torch.int64


def test_bags_from_lists() -> None:
    bags = Jagged.from_lists([[3, 1], [], [2]])
    assert bags.values.tolist() == [3, 1, 2]
    assert bags.num_bags == 3
    assert bags.bag_of_values().tolist() == [0, 0, 2]
    assert Jagged.from_ids(torch.tensor([5, 6])).lengths.tolist() == [1, 1]


def test_part_of_a_batch_are_its_bags_from_one_to_another() -> None:
    bags = Jagged.from_lists([[1, 2], [], [3], [4, 5, 6]])
    for start, stop, expected in ((0, 4, [1, 2, 3, 4, 5, 6]), (1, 3, [3]), (0, 2, [1, 2]), (2, 2, []), (4, 4, [])):
        part = bags.part(start, stop)
        assert (part.values.tolist(), part.num_bags) == (expected, stop - start)
    weighted = Jagged(bags.values, bags.lengths, torch.arange(6.0))
    assert weighted.part(2, 4).weights.tolist() == [2.0, 3.0, 4.0, 5.0]
