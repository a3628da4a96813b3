"""A recipe says which key has its data."""

from __future__ import annotations

import pytest

from embedtrain.errors import UserError
from embedtrain.recipes.base import Grow
from embedtrain.recipes.growing import _differing_inputs, _refuse_own_keys
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.registry import recipe_of


def test_a_grown_run_needs_the_recipes_own_key_of_data() -> None:
    grow = Grow(
        base_files=lambda config: [],
        tables=lambda config, data: [],
        facts=lambda config, data: {},
        write_files=lambda config, data, folder: None,
        data_key="shop.books",
    )
    _refuse_own_keys(grow, ["shop.books=new.txt"])
    with pytest.raises(UserError, match=r"expected shop\.books=PATH"):
        _refuse_own_keys(grow, ["data.path=new.txt"])


def test_the_order_of_a_towers_features_is_an_input_of_the_dense_part_if_it_has_hidden_layers() -> None:
    grow = recipe_of("retrieval").grow
    assert grow is not None
    orders = []
    for features in ("{kind: {}, colour: {}}", "{colour: {}, kind: {}}"):
        settings = ["data.path=x.csv", f"items={{path: items.csv, hidden: [4], features: {features}}}"]
        orders.append(grow.inputs(load_config(None, ["model=retrieval", *settings])))
    assert _differing_inputs(*orders) == ["items.features (was ['kind', 'colour'], is ['colour', 'kind'])"]
