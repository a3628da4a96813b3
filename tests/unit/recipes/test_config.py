from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from embedtrain import optim
from embedtrain.config.optimizer import OPTIMIZERS
from embedtrain.config.resolved import differing_keys, to_yaml
from embedtrain.errors import UserError
from embedtrain.optim.optimizer import CommonOptions
from embedtrain.recipes.loading import load_config

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
        ("gradient_accumulation_steps=4", "train.accumulate_steps"),
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
        ("optimizer.name=adamax", ["adamax", "rowwise_adagrad, adagrad, sgd"]),
        ("optimizer.lr=0", ["optimizer.lr must be positive"]),
        ("word2vec.sample=1.5", ["word2vec.sample"]),
        ("word2vec.architecture=glove", ["word2vec.architecture", "glove"]),
        ("train.words_per_step=1000", ["multiple of train.block_words"]),
        ("train.step_growth=0", ["train.step_growth must be a share", "got 0"]),
        ("word2vec.damping=some", ["word2vec.damping", "curvature"]),
        ("schedule.min_factor=2", ["schedule.min_factor"]),
        ("run.device=tpu", ["run.device must be auto, cpu or cuda, got 'tpu'"]),
        ("train.epochs", ["expected key=value"]),
        ("=3", ["expected key=value"]),
        ("table=3", ["table"]),
        ("optimizer.betas=[1", ["'optimizer.betas=[1'", "not valid YAML"]),
        ("data.path", ["expected key=value"]),
    ],
)
def test_a_wrong_value_is_one_clear_line(override: str, parts: list[str]) -> None:
    message = message_of(None, TEXT, override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("model", ["word2vec", "retrieval"])
def test_a_model_that_counts_its_data_first_refuses_standard_input(model: str) -> None:
    assert "standard input can be read only once: write it to a file" in message_of(
        None, f"model={model}", "data.path=-"
    )


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
    second = load_config(None, ["data.path=copy.txt", "run.path=elsewhere", "log.every_steps=7"])
    assert differing_keys(first, second) == []
    third = load_config(None, [TEXT, "optimizer.lr=0.75", "table.dim=9"])
    assert [entry.partition(" ")[0] for entry in differing_keys(first, third)] == [
        "optimizer.lr",
        "table.dim",
    ]


@pytest.mark.parametrize("name", ["word2vec", "quickstart"])
def test_the_configurations_that_we_ship_are_valid(name: str) -> None:
    path = Path(__file__).parents[3] / "configs" / f"{name}.yaml"
    load_config(str(path), [TEXT])


def test_an_unknown_model_is_named() -> None:
    assert "there is no model 'glove'; there are word2vec" in message_of(None, "model=glove")
    assert "there is no model" in message_of(None, "model=[word2vec]")


@pytest.mark.parametrize("override", ["train.precision=bfloat16", "train.tf32=true"])
def test_a_model_without_dense_layers_refuses_their_precision(override: str) -> None:
    assert "need dense layers, but model=word2vec has none: leave them out" in message_of(None, TEXT, override)
    ranking = load_config(None, ["model=ranking", "data.path=x", "data.categorical=[a]", override])
    assert (ranking.train.precision, ranking.train.tf32) in (("bfloat16", False), ("float32", True))


def test_the_optimizers_name_chooses_its_options() -> None:
    config = load_config(None, [TEXT, "optimizer.name=adam", "optimizer.betas=[0.8,0.99]", "optimizer.max_norm=2"])
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.betas) == ("adam", 0.001, [0.8, 0.99])
    assert load_config(None, [TEXT]).optimizer.name == "rowwise_adagrad"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_section_has_exactly_the_options_of_its_optimizer(name: str) -> None:
    of_class = inspect.signature(optim.OPTIMIZERS[name].__init__).parameters.keys() - {"self", "collection", "options"}
    of_all = CommonOptions.__annotations__.keys()
    of_section = {field.name for field in fields(OPTIMIZERS[name])}
    assert of_class | of_all == of_section - {"name", "reset_state_from_step", "tables"}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["optimizer.name=sgd", "optimizer.betas=[1]"],
            ["sgd has no option betas", "adam and rowwise_adam have"],
        ),
        (
            ["optimizer.accumulator_decay=0.9", "optimizer.name=adagrad"],
            ["has no option", "rowwise_adagrad has"],
        ),
        (["optimizer.name=adamax"], ["there is no optimizer 'adamax'; there are rowwise_adagrad, adagrad, sgd"]),
        (["optimizer.momentum=0.9"], ["no key optimizer.momentum"]),
        (["schedule.name=inverse_sqrt"], ["set schedule.warmup to more than 0"]),
        (["schedule.warmup=1"], ["schedule.warmup must be a share"]),
        (["optimizer.reset_state_from_step=-1"], ["reset_state_from_step must be at least 0"]),
    ],
)
def test_an_option_that_does_not_apply_is_refused_by_name(overrides: list[str], parts: list[str]) -> None:
    message = message_of(None, TEXT, *overrides)
    assert all(part in message for part in parts), message


def test_another_optimizer_than_the_files_starts_from_its_own_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {name: rowwise_adagrad, lr: 0.6, initial_accumulator_value: 7.0}\n")
    assert load_config(path, [TEXT, "optimizer.name=rowwise_adagrad"]).optimizer.initial_accumulator_value == 7.0
    assert load_config(path, [TEXT, "optimizer.name=adam"]).optimizer.lr == 0.001


def test_but_keeps_what_means_the_same_for_all(tmp_path: Path) -> None:
    path = write(tmp_path, "optimizer: {lr: 0.6, eps: 0.1, weight_decay: 0.01, nonfinite: skip, max_grad_norm: 2.0}\n")
    chosen = load_config(path, [TEXT, "optimizer.name=adam"]).optimizer
    assert (chosen.lr, chosen.eps) == (0.001, 1e-8)
    assert (chosen.weight_decay, chosen.nonfinite, chosen.max_grad_norm) == (0.01, "skip", 2.0)


def test_when_the_state_is_reset_may_change() -> None:
    first, second = (load_config(None, [TEXT, *more]) for more in ([], ["optimizer.reset_state_from_step=9"]))
    assert differing_keys(to_yaml(first), second) == []


@pytest.mark.parametrize("model", ["word2vec", "retrieval", "ranking"])
def test_a_run_from_before_the_quotes_of_files_were_settings_goes_on(model: str) -> None:
    config = load_config(None, [f"model={model}", "data.path=x"])
    earlier = [line for line in to_yaml(config).splitlines() if "quote:" not in line]
    # The delimiter of CSV was a value then, and follows from the format now.
    earlier = [line.replace("delimiter: null", "delimiter: ','") for line in earlier]
    assert differing_keys("\n".join(earlier), config) == []


def test_a_run_of_before_there_was_a_setting_has_its_default() -> None:
    config = load_config(None, ["data.path=x"])
    earlier = "\n".join(line for line in to_yaml(config).splitlines() if not line.startswith("start_from"))
    assert "start_from" not in earlier
    assert differing_keys(earlier, config) == []
    config.start_from_grow = True
    assert differing_keys(earlier, config) == ["start_from_grow (was absent, is True)"]
