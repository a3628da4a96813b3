from __future__ import annotations

import pytest
import torch

from embedtrain import FeatureSpec, Jagged, TableSpec
from embedtrain.embedding.features import resolve_features


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "non-empty"),
        ({"name": "a/b"}, "without '/'"),
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
        ({"invalid_ids": "drop"}, "each id owes a vector"),
    ],
)
def test_impossible_features_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureSpec("clicked", **arguments)


def test_a_feature_of_a_table_that_does_not_exist_names_those_that_do() -> None:
    tables = [TableSpec("user", 3, 2), TableSpec("item", 3, 2)]
    with pytest.raises(ValueError, match=r"'clicked'.*'itme'.*user, item"):
        resolve_features(tables, [FeatureSpec("clicked", "itme")])


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


def test_bags_from_lists() -> None:
    bags = Jagged.from_lists([[3, 1], [], [2]])
    assert bags.values.tolist() == [3, 1, 2]
    assert bags.num_bags == 3
    assert bags.bag_of_values().tolist() == [0, 0, 2]
    assert Jagged.from_ids(torch.tensor([5, 6])).lengths.tolist() == [1, 1]
