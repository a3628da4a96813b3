"""What a configuration says of quotes and delimiters reaches the files of each recipe, held-out ones too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.ranking.recipe import prepare as prepare_ranking
from embedtrain.recipes.retrieval.recipe import prepare as prepare_retrieval
from embedtrain.recipes.word2vec.recipe import prepare as prepare_word2vec

RUNTIME = Runtime(ONE_PROCESS, 0, torch.device("cpu"))


def written(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def test_quotes_of_retrieval(tmp_path: Path) -> None:
    train = written(tmp_path, "train.csv", "user,item\n'u','a,b'\nu,c\nv,c\n")
    held_out = written(tmp_path, "test.csv", "user,item\n'v','a,b'\n")
    users = written(tmp_path, "users.csv", "id,city\n*u*,*x,y*\nv,z\n")
    items = written(tmp_path, "items.csv", "id,genre\n|a,b|,|p,q|\nc,r\n")
    config = load_config(
        None,
        [
            "model=retrieval",
            f"data.path={train}",
            f"data.cache_path={tmp_path / 'cache'}",
            "data.quote='",
            f"evaluate.path={held_out}",
            f"users.path={users}",
            "users.quote=*",
            "users.features.city.separator=;",
            f"items.path={items}",
            "items.quote=|",
            "items.features.genre.separator=;",
        ],
    )
    interactions, sizes = prepare_retrieval(config, RUNTIME)
    assert sorted(interactions.users.words) == ["u", "v"]
    assert sorted(interactions.items.words) == ["a,b", "c"]
    assert [interactions.items.words[row] for row in interactions.held_out.values] == ["a,b"]
    assert (sizes.num_rows["user.city"], sizes.num_rows["item.genre"]) == (2, 2)
    assert interactions.left_out["users_without_features"] == interactions.left_out["items_without_features"] == 0


def test_quotes_of_baskets(tmp_path: Path) -> None:
    path = written(tmp_path, "a.csv", "user,item\n'1','a,b'\n1,c\n")
    overrides = [f"data.path={path}", "data.format=csv", "data.min_count=1", f"data.cache_path={tmp_path / 'cache'}"]
    corpus, _ = prepare_word2vec(load_config(None, ["model=word2vec", *overrides, "data.quote='"]), RUNTIME)
    assert sorted(corpus.vocabulary.words) == ["a,b", "c"]


def test_quotes_and_columns_of_clicks(tmp_path: Path) -> None:
    train = written(tmp_path, "train.csv", "1;'a;b'\n0;c\n")
    held_out = written(tmp_path, "test.csv", "1;'a;b'\n")
    config = load_config(
        None,
        [
            "model=ranking",
            f"data.path={train}",
            f"data.valid_path={held_out}",
            f"data.cache_path={tmp_path / 'cache'}",
            "data.columns=[label,city]",
            "data.categorical=[city]",
            "data.delimiter=;",
            "data.quote='",
        ],
    )
    clicks, _ = prepare_ranking(config, RUNTIME)
    assert sorted(clicks.layout.vocabulary("city")["word"].to_pylist()) == [b"a;b", b"c"]
    assert clicks.held_out is not None
    assert clicks.held_out.num_examples == 1


@pytest.mark.parametrize(
    ("model", "override", "message"),
    [
        ("ranking", "data.delimiter=auto", "data.delimiter: expected one ASCII character .*'auto'"),
        ("ranking", "data.delimiter=\n", "data.delimiter: expected one ASCII character"),
        ("ranking", 'data.delimiter="', "data.quote: expected another character than the delimiter"),
        ("word2vec", "data.quote=é", "data.quote: expected one ASCII character"),
        ("retrieval", "data.quote=\r", "data.quote: expected one ASCII character"),
        ("retrieval", "users.quote=ab", "users.quote: expected one ASCII character"),
        ("retrieval", "items.quote=,", "items.quote: expected another character than the delimiter"),
    ],
)
def test_characters_that_cannot_be_used_are_refused_with_their_key(model: str, override: str, message: str) -> None:
    of_ranking = ["data.categorical=[c]"] if model == "ranking" else []
    format = [f"{override.split('.')[0]}.format=csv"]
    with pytest.raises(UserError, match=message):
        load_config(None, [f"model={model}", "data.path=x", *of_ranking, *format, override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.positive=", "data.positive must not be empty"),
        ("data.delimiter=", "data.delimiter: expected one ASCII character"),
        ("data.quote=,", "data.quote: expected another character than the delimiter"),
    ],
)
def test_ranking_refuses_what_no_text_can_be_split_or_labelled_by(override: str, message: str) -> None:
    overrides = ["model=ranking", "data.path=a.csv", "data.format=csv", "data.categorical=[u]", override]
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)
