from __future__ import annotations

from pathlib import Path

import pytest

from embedtrain.config import differing_keys, load_config, to_yaml
from embedtrain.errors import UserError

TEXT = "data.path=corpus.txt"


def message_of(path: str | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "table: {dim: 7}\nseed: 3\ndata: {path: a.txt}\n")
    config = load_config(path, ["table.dim=9", "data.path=[b.txt,c.txt]", "checkpoint.every_steps=5"])
    assert config.table.dim == 9
    assert config.seed == 3
    assert config.word2vec.window == 5
    assert config.data.path == ["b.txt", "c.txt"]
    assert config.checkpoint.every_steps == 5


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("tabel.dim=3", "table.dim"),
        ("table.dims=3", "table.dim"),
        ("train.epoch=3", "train.epochs"),
        ("seeds=3", "seed"),
        ("vector_size=3", "table.dim"),
        ("optimiser={lr: 3}", "optimizer.lr"),
    ],
)
def test_an_unknown_key_says_what_was_meant(override: str, meant: str) -> None:
    message = message_of(None, TEXT, override)
    assert f"no key {override.partition('=')[0]}" in message
    assert f"did you mean {meant}?" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("table.dim=many", ["table.dim", "many"]),
        ("table.dim=0", ["table.dim must be at least 1, got 0"]),
        ("table.dtype=float16", ["table.dtype", "float16"]),
        ("train.epochs=-1", ["train.epochs"]),
        ("optimizer.name=adam", ["optimizer.name", "adam"]),
        ("optimizer.lr=0", ["optimizer.lr must be positive"]),
        ("word2vec.sample=1.5", ["word2vec.sample"]),
        ("word2vec.architecture=glove", ["word2vec.architecture", "glove"]),
        ("train.words_per_step=1000", ["multiple of train.block_words"]),
        ("schedule.min_factor=2", ["schedule.min_factor"]),
        ("run.device=tpu", ["run.device must be auto, cpu or cuda, got 'tpu'"]),
        ("train.epochs", ["expected key=value"]),
        ("=3", ["expected key=value"]),
        ("table=3", ["table"]),
        ("data.path={", ["data.path={"]),
    ],
)
def test_a_wrong_value_is_one_clear_line(override: str, parts: list[str]) -> None:
    message = message_of(None, TEXT, override)
    for part in parts:
        assert part in message


def test_a_missing_text_is_named() -> None:
    assert "data.path" in message_of(None)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("table: [1, 2", "not valid YAML"),
        ("- 1\n- 2\n", "keys and values"),
        ("tabel: {dim: 3}", "did you mean table"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: str, part: str) -> None:
    path = write(tmp_path, content)
    message = message_of(path, TEXT)
    assert part in message
    assert path in message


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    assert "there is no configuration file nowhere.yaml" in message_of("nowhere.yaml")
    assert "cannot be read" in message_of(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    assert "binary.yaml" in message_of(str(tmp_path / "binary.yaml"))


def test_only_what_defines_the_training_counts_as_a_difference() -> None:
    first = to_yaml(load_config(None, [TEXT]))
    second = to_yaml(load_config(None, ["data.path=copy.txt", "run.path=elsewhere", "log.every_steps=7"]))
    assert differing_keys(first, second) == []
    third = to_yaml(load_config(None, [TEXT, "optimizer.lr=0.7", "table.dim=9"]))
    assert [entry.partition(" ")[0] for entry in differing_keys(first, third)] == [
        "optimizer.lr",
        "table.dim",
    ]


@pytest.mark.parametrize("name", ["word2vec", "quickstart"])
def test_the_configurations_that_we_ship_are_valid(name: str) -> None:
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    load_config(str(path), [TEXT])


def test_an_unknown_model_is_named() -> None:
    assert "there is no model 'glove'; there are word2vec" in message_of(None, "model=glove")
    assert "there is no model" in message_of(None, "model=[word2vec]")
