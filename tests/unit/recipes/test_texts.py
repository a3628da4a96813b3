"""A value of a key of text is what is written, on the command line and in files; other keys take YAML."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from embedtrain.config.resolved import differing_keys, to_yaml
from embedtrain.config.sections import Config
from embedtrain.errors import UserError
from embedtrain.recipes.loading import config_from_yaml, load_config
from embedtrain.recipes.ranking.config import FeatureConfig, RankingConfig
from embedtrain.recipes.showing import show_config

LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 64))
CLICKS = ("model=ranking", "data.path=x", "data.num_rows=9")


def value_of(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("run.path", "r/trial #2", "r/trial #2"),
        ("run.path", "a: b", "a: b"),
        ("run.path", " a ", " a "),
        ("run.path", "'r'", "'r'"),
        ("run.path", "${oops", "${oops"),
        ("run.path", "${run.device}", "${run.device}"),
        ("run.path", "$HOME/50%24", "$HOME/50%24"),
        ("run.path", "日本\n", "日本\n"),
        ("data.path", "a: b.txt", "a: b.txt"),
        ("data.path", "corpus #2.txt", "corpus #2.txt"),
        ("data.path", "???", "???"),
        ("data.path", "5", "5"),
        ("data.path", "2024-01-01", "2024-01-01"),
        ("data.path", "{a,b}.csv", "{a,b}.csv"),
        ("data.path", "[a.txt,b.txt]", ["a.txt", "b.txt"]),
        ("data.path", "[a: b.txt, c #2.txt,]", ["a: b.txt", "c #2.txt"]),
        ("data.path", "['a, b.txt', \"c's.txt\", it's.txt]", ["a, b.txt", "c's.txt", "it's.txt"]),
        ("data.path", "[0-9].txt", "[0-9].txt"),
        ("data.path", "'null'", "null"),
        ("data.positive", "yes", "yes"),
        ("data.positive", ">50K", ">50K"),
        ("data.positive", "~", "~"),
        ("data.positive", "null", None),
        ("data.positive", "'null'", "null"),
        ("data.positive", '"null"', "null"),
        ("data.positive", "\"'null'\"", "'null'"),
        ("data.columns", "[on,01,1e3]", ["on", "01", "1e3"]),
        ("data.columns", "[null,'']", ["null", ""]),
        ("data.columns", "[]", []),
        ("data.columns", "null", None),
        ("data.delimiter", ";", ";"),
        ("data.label", "no", "no"),
        ("data.max_bad_lines", "1_000", 1000),
        ("data.num_rows", "null", None),
        ("ranking.top", "[8, 4]", [8, 4]),
        ("optimizer.lr", "1e-2", 0.01),
        ("log.tensorboard", "no", False),
        ("table.wire_dtype", "null", None),
        (
            "data.features",
            "{on: {bag: yes, separator: ;}, 01: {}}",
            {"on": FeatureConfig(bag=True, separator=";"), "01": FeatureConfig()},
        ),
        ("data.features.a.b.separator", "#", "#"),
    ],
)
def test_what_a_setting_of_the_command_line_means(key: str, text: str, value: Any) -> None:
    columns = "data.categorical=[on,01,a.b]"
    config = load_config(None, [*CLICKS, columns, "data.features={a.b: {bag: true}}", f"{key}={text}"])
    if key.startswith("data.features.a.b"):
        assert config.data.features["a.b"].separator == value
    elif key == "data.features":
        assert {**config.data.features, **value} == config.data.features
    else:
        assert value_of(config, key) == value


def test_a_file_says_what_is_written_in_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        """
model: ranking
data:
  path: [2024-01-01, 010, "a #b", null]
  positive: yes
  label: 1e3
  columns: [on, 01, 1e3, null, label]
  categorical: &names [on, 01]
  dense: *names
  valid_path: null
  features:
    on: &small {num_rows: 0x10, separator: 1}
    01: {<<: *small, bag: on}
  delimiter: \';\'
  num_rows: 1_000
optimizer: {tables: {on: {lr: 1e-3}, 01: {name: adam}}}
""".replace("\\", "")
    )
    data = load_config(str(path), []).data
    assert data.path == ["2024-01-01", "010", "a #b", "null"]
    assert (data.positive, data.label, data.delimiter, data.valid_path) == ("yes", "1e3", ";", None)
    assert data.columns == ["on", "01", "1e3", "null", "label"]
    assert data.categorical == data.dense == ["on", "01"]
    assert data.features == {
        "on": FeatureConfig(num_rows=16, separator="1"),
        "01": FeatureConfig(num_rows=16, separator="1", bag=True),
    }
    assert data.num_rows == 1000
    assert load_config(str(path), []).optimizer.of_table("on").lr == 1e-3
    assert load_config(str(path), []).optimizer.of_table("01").name == "adam"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("run: {path: null}", ["run.path must be given and cannot be null", 'write "null"']),
        ("run: {path: }", ["run.path must be given"]),
        ("run: {path: !x y}", ["YAML tag !x at run.path"]),
        ("run: {path: a, path: b}", ["run.path is given twice"]),
        ("run: {[a]: b}", ["expected names as keys of run"]),
        ("a: &a {b: *a}", ["config.yaml"]),
        (LAUGHS, ["config.yaml: this YAML stands for more than 100,000 values, because of its aliases (*name)"]),
        ("data: {categorical: user}", ["data.categorical", "user"]),
        ("data: {path: {a: b}}", ["no key data.path.a", "did you mean data.path?"]),
        ("data: {path: [[a]]}", ["data.path: expected a list of texts"]),
        ("seed: ${train.epochs}", ["seed", "'${train.epochs}'"]),
        ("seed: !!int x", ["config.yaml"]),
        ("just text", ["expected keys and values, got a text"]),
        ("a: [\nb", ["not valid YAML", "in line 2"]),
    ],
)
def test_a_file_that_means_nothing_is_refused(content: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        load_config(str(path), CLICKS)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("run.path=null", ["run.path must be given and cannot be null", "run.path=\"'null'\""]),
        ("data.columns=a", ["expected a list such as [a,b], got 'a'"]),
        ("seed=${train.epochs}", ["seed", "'${train.epochs}'"]),
        ("seed=???", ["seed", "'???'"]),
        ("run..path=x", ["has an empty name"]),
    ],
)
def test_a_setting_that_means_nothing_is_refused(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [*CLICKS, override])
    for part in [repr(override), *parts]:
        assert part in str(caught.value)


def test_a_format_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"^data\.format: expected a format of criteo, .*csv.*, got '\?\?\?'$"):
        load_config(None, [*CLICKS, "data.format=???"])


def clicks() -> RankingConfig:
    return copy.deepcopy(_CLICKS)


_CLICKS: RankingConfig = load_config(None, [*CLICKS, "data.categorical=[a]"])
# Each example loads a configuration or two, which takes a tenth of a second.
some = settings(max_examples=12, deadline=None)
texts = st.text(min_size=1) | st.sampled_from(
    ["null", "~", "yes", "01", "1e3", "1_0", "0x1F", "1:30", "2024-01-01", "a: b", "a #b", "'", "[", "${", "???", "%3F"]
)


@some
@given(path=texts.filter(lambda text: text.strip("/")), paths=st.lists(texts, min_size=1), name=texts, positive=texts)
def test_a_saved_configuration_says_the_same_again(path: str, paths: list[str], name: str, positive: str) -> None:
    base = clicks()
    base.run.path = path
    base.data.path = paths
    base.data.categorical = [name]
    base.data.features = {name: FeatureConfig(separator="|", init_from=None)}
    base.data.positive = positive
    assert config_from_yaml(to_yaml(base), "saved") == base
    assert differing_keys(to_yaml(base), base) == []


@some
@given(text=texts.filter(lambda text: text.strip("/") and "null" not in text))
def test_a_setting_of_text_is_that_text(text: str) -> None:
    assert load_config(None, ["data.path=x", f"run.path={text}"]).run.path == text


def by_omegaconf(config: Config) -> str:
    """What run folders hold that an earlier version wrote."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


@some
@given(text=texts.filter(lambda text: text.strip("/") and "${" not in text and text != "???"))
def test_a_configuration_saved_by_an_earlier_version_says_the_same(text: str) -> None:
    config = clicks()
    config.run.path = text
    config.data.path = [text, "x"]
    config.data.positive = text
    config.data.columns = [text]
    config.data.features = {text: FeatureConfig()}
    assert config_from_yaml(by_omegaconf(config), "saved") == config
    assert differing_keys(by_omegaconf(config), config) == []


@pytest.mark.parametrize("name", sorted(path.name for path in Path("configs").glob("*.yaml")))
def test_run_folders_hold_the_same_bytes_as_before(name: str) -> None:
    config = load_config(f"configs/{name}", ["data.path=x"])
    assert to_yaml(config) == by_omegaconf(config)


def test_what_is_shown_says_where_a_text_was_given() -> None:
    shown = show_config(None, ["data.path=a: b.txt", "run.path=??? ${x}"])
    assert "path: 'a: b.txt'" in shown and "path: ??? ${x}" in shown


def test_a_plain_question_in_a_file_has_to_be_answered(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  path: ???\nseed: ???\n")
    with pytest.raises(UserError, match=r"^data\.path must be given, such as data\.path=VALUE"):
        load_config(str(path), ["seed=1"])
    # A key that has a default is not asked for.
    assert load_config(str(path), ["data.path=x"]).seed == 1
    assert load_config(str(path), ["data.path=x", "seed=3"]).seed == 3
    path.write_text("data: {path: '???'}\n")
    assert load_config(str(path), []).data.path == "???"


@pytest.mark.parametrize("name", ["word2vec", "retrieval", "ranking", "ranking_criteo"])
def test_a_shipped_configuration_needs_its_data(name: str) -> None:
    path = Path(__file__).parents[3] / "configs" / f"{name}.yaml"
    with pytest.raises(UserError, match=r"^data\.path must be given"):
        load_config(str(path), [])
