from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedtrain.data.click_schema import CRITEO_DENSE
from embedtrain.data.click_stream import ClickStream, StreamOptions
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.ranking.config import RankingConfig
from embedtrain.recipes.ranking.options import click_schema
from embedtrain.recipes.ranking.recipe import prepare

CSV = ("model=ranking", "data.path=a.csv", "data.categorical=[user,shop]")


def config_of(*overrides: str) -> RankingConfig:
    config = load_config(None, overrides)
    assert isinstance(config, RankingConfig)
    return config


def test_columns_take_what_all_have_and_then_their_own() -> None:
    config = config_of(
        *CSV,
        "data.num_rows=100",
        "data.features.shop={encoding: vocabulary, num_rows: 7, min_count: 3, bag: true, separator: ;}",
    )
    user, shop = click_schema(config.data).categorical
    assert (user.num_rows, user.encoding, user.is_bag) == (100, "hash", False)
    assert (shop.num_rows, shop.encoding, shop.is_bag) == (7, "vocabulary", True)
    assert (shop.min_count, shop.separator) == (3, ";")


def test_columns_without_a_number_of_rows_have_vocabularies() -> None:
    assert {column.encoding for column in click_schema(config_of(*CSV).data).categorical} == {"vocabulary"}


@pytest.mark.parametrize("name", ["ranking", "ranking_criteo"])
def test_the_configurations_that_are_shipped_are_right(name: str) -> None:
    config = load_config(f"configs/{name}.yaml", ["data.path=x"])
    assert isinstance(config, RankingConfig)
    schema = click_schema(config.data)
    if name == "ranking_criteo":
        assert schema.dense == CRITEO_DENSE
        assert len(schema.categorical) == 26
        assert {column.name for column in schema.categorical if column.num_rows == 1000} == set(config.data.features)
    else:
        assert len(schema.used_columns) == 15


def test_a_shipped_configuration_learns_from_standard_input() -> None:
    config = load_config("configs/ranking_criteo.yaml", ["schedule.name=constant", "data.path=-"])
    assert isinstance(config, RankingConfig)
    assert config.data.is_stream
    ClickStream(StreamOptions(config.data.path, config.train.global_batch_size), click_schema(config.data), ONE_PROCESS)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.poll_seconds=3"], r"give data\.stream=true too"),
        (["data.stream=true", "data.path=[a.csv,b.csv]", "schedule.name=constant"], "data.path of a stream must be"),
        (["data.stream=true", "train.epochs=2"], r"train\.epochs must be 1, because a stream is read once, got 2"),
        (["data.features.shp.dim=4"], "data.features: there is no column shp; there are user, shop"),
        (["data.features.user.dim=0"], r"data\.features\.user\.dim must be at least 1"),
        (["data.encoding=hash"], "feature user: encoding 'hash' needs num_rows"),
        (["train.global_batch_size=100"], r"train\.global_batch_size must be a multiple of data\.block_examples"),
        (["train.batch_size=64"], r"did you mean train\.global_batch_size\?"),
        (["data.format=criteo", "data.categorical=[]", "data.label=x"], r"already defines data\.label: leave it out"),
        (["data.format=criteo"], r"data\.categorical: there is no column user, shop; there are C1, C2"),
        (["data.max_bad_lines=-1"], r"max_bad_lines must be at least 0"),
        (["evaluate.every_steps=0"], r"evaluate\.every_steps must be at least 1"),
        (["word2vec.window=3"], r"there is no key word2vec\.window for model ranking"),
    ],
    ids=str,
)
def test_mistakes_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        click_schema(config_of(*CSV, *overrides).data)


def test_labels_that_are_all_alike_are_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_text("label,c\n>50K.,a\n<=50K.,b\n")
    data = [f"data.path={tmp_path / 'a.csv'}", f"data.cache_path={tmp_path / 'cache'}", "data.categorical=[c]"]
    settings = ["model=ranking", *data, "train.global_batch_size=32", "data.positive=>50K"]
    prepare(load_config(None, settings), Runtime(ONE_PROCESS, 0, torch.device("cpu")))
    assert "no example is positive: check that '>50K' is the value of 'label' for positives" in caplog.text
