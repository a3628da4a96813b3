"""A recipe says which key has its data."""

from __future__ import annotations

import pytest

from embedtrain.errors import UserError
from embedtrain.recipes.base import Grow
from embedtrain.recipes.growing import _refuse_own_keys


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
