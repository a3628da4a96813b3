"""Errors and warnings about data name the setting that mends them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.registry import recipe_of


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.csv").write_text("user,item\n" + "".join(f"u{n % 5},i{n % 7}\n" for n in range(40)))
    Path("people.csv").write_text("id,age\nu1,30\n")
    Path("clicks.jsonl").write_text('{"label": 1, "city": "a"}\n{"label": 0, "city": "b"}\n')
    Path("strangers.csv").write_text("user,item\nx1,i1\n")


def prepare(model: str, *settings: str) -> None:
    config = load_config(None, [f"model={model}", "data.cache_path=cache", *settings])
    recipe_of(model).prepare(config, Runtime(ONE_PROCESS, 0, torch.device("cpu")))


PEOPLE = ("data.path=pairs.csv", "users.path=people.csv")


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("retrieval", ["data.path=pairs.csv", "data.user_column=who"], r"no column 'who'; .*; data\.user_column says"),
        ("retrieval", [*PEOPLE, "users.features={sex: {}}"], r"no column 'sex'; .*; users\.features says"),
        (
            "retrieval",
            [*PEOPLE, "users.id_column=name", "users.features={age: {}}"],
            r"no column 'name'; .*; users\.id_column says",
        ),
        (
            "word2vec",
            ["data.path=pairs.csv", "data.format=csv", "data.basket_column=a", "data.item_column=b"],
            r"no column 'a', 'b'; .*; data\.basket_column, data\.item_column say which to read",
        ),
        (
            "ranking",
            ["data.path=clicks.jsonl", "data.categorical=[city]"],
            r"data\.label, data\.categorical say.*read as csv, and its name is one of jsonl: give data\.format=jsonl",
        ),
        (
            "ranking",
            ["data.path=clicks.jsonl", "data.format=lines", "data.categorical=[city]"],
            r"data\.format: expected a format of criteo, csv, tsv, parquet, jsonl, recbole, got 'lines'",
        ),
    ],
)
def test_the_setting_is_named(model: str, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(model, *settings)


def test_rows_that_are_read_as_text_and_held_out_strangers_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    prepare("word2vec", "data.path=clicks.jsonl", "data.min_count=1")
    assert "clicks.jsonl: read as text, names of columns and all" in caplog.text
    assert "data.format=jsonl, with data.basket_column and data.item_column" in caplog.text
    prepare("retrieval", "data.path=pairs.csv", "evaluate.path=strangers.csv")
    assert "evaluate.path=strangers.csv has no user of the training data: all its measures will be 0" in caplog.text
