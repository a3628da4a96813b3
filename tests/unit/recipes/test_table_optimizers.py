"""Different optimizers for different tables, from the configuration to the collection."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import embedtrain as et
from embedtrain.config.optimizer import OptimizerConfig
from embedtrain.config.resolved import differing_keys, to_yaml
from embedtrain.errors import UserError
from embedtrain.recipes.loading import config_from_yaml, load_config
from embedtrain.recipes.optimizers import build_optimizer, optimizer_names

CLICKS = ("model=ranking", "data.path=a.csv", "data.categorical=[user,shop,tag]", "data.num_rows=10")


def section_of(*overrides: str, file: Path | None = None) -> OptimizerConfig:
    return load_config(None if file is None else str(file), [*CLICKS, *overrides]).optimizer


def test_a_table_has_another_optimizer_with_that_ones_defaults() -> None:
    section = section_of("optimizer.lr=0.5", "optimizer.tables.shop={name: adam, betas: [0.8, 0.9]}")
    own = section.of_table("shop")
    assert (own.name, own.lr, own.betas, own.eps) == ("adam", 0.001, [0.8, 0.9], 1e-8)
    assert (section.of_table("user").name, section.of_table("user").lr) == ("rowwise_adagrad", 0.5)


def test_without_a_name_a_table_has_the_main_one_with_other_options() -> None:
    section = section_of("optimizer.lr=0.5", "optimizer.weight_decay=0.1", "optimizer.tables.shop.lr=0.2")
    own = section.of_table("shop")
    assert (own.name, own.lr, own.weight_decay) == ("rowwise_adagrad", 0.2, 0.1)


@pytest.mark.parametrize(
    ("model", "lr", "accumulator"),
    [
        (CLICKS, 0.05, 0.0),
        (("model=retrieval", "data.path=x", "users.path=u.csv", "users.features.shop={}"), 0.3, 0.0),
        (("model=word2vec", "data.path=x"), 0.7, 100.0),
    ],
    ids=["ranking", "retrieval", "word2vec"],
)
def test_a_table_has_the_models_own_optimizer_with_the_models_defaults(
    model: tuple[str, ...], lr: float, accumulator: float
) -> None:
    table = "input" if "model=word2vec" in model else "user"
    given = ["optimizer.name=adam", f"optimizer.tables.{table}.name=rowwise_adagrad"]
    own = load_config(None, [*model, *given]).optimizer.of_table(table)
    assert (own.name, own.lr, own.initial_accumulator_value) == ("rowwise_adagrad", lr, accumulator)


def test_the_command_line_replaces_a_tables_optimizer_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("optimizer:\n  tables:\n    shop: {name: adam, lr: 0.3, eps: 0.5}\n    user: {lr: 0.7}\n")
    assert section_of("optimizer.tables.shop.lr=0.4", file=file).of_table("shop").eps == 0.5
    changed = section_of("optimizer.tables.shop.lr=0.4", "optimizer.tables.shop.name=rmsprop", file=file)
    assert (changed.of_table("shop").name, changed.of_table("shop").lr, changed.of_table("shop").eps) == (
        "rmsprop",
        0.4,
        1e-8,
    )
    # Of another main optimizer, what was said of the file's one for a table is not meant any more.
    other = section_of("optimizer.name=sgd", file=file)
    assert (other.of_table("shop").name, other.of_table("shop").eps) == ("adam", 0.5)
    assert (other.of_table("user").name, other.of_table("user").lr) == ("sgd", 0.01)


def test_a_tables_name_may_hold_a_dot() -> None:
    overrides = ["model=retrieval", "data.path=x", "users.path=u.csv", "users.features.age={}"]
    config = load_config(None, [*overrides, "optimizer.tables.user.age.lr=0.3", "optimizer.tables.user.name=sgd"])
    assert config.optimizer.of_table("user.age").lr == 0.3
    assert config.optimizer.of_table("user").name == "sgd"


def test_a_saved_configuration_says_the_same_again() -> None:
    config = load_config(None, [*CLICKS, "optimizer.tables.shop.name=adam", "optimizer.tables.tag.lr=0.2"])
    text = to_yaml(config)
    assert config_from_yaml(text, "saved").optimizer.tables == config.optimizer.tables
    other = load_config(None, [*CLICKS, "optimizer.tables.shop.name=adam"])
    assert any(entry.startswith("optimizer.tables.tag.lr") for entry in differing_keys(text, other))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.tables.shp.lr=0.1", "there is no table shp; the tables are user, shop, tag"),
        ("optimizer.tables.shop.name=adamax", "there is no optimizer 'adamax'; there are rowwise_adagrad"),
        ("optimizer.tables.shop={name: sgd, betas: [1]}", "tables.shop: the optimizer sgd has no option betas, adam"),
        ("optimizer.tables.shop.learning_rate=1", r"no key optimizer.tables.shop.learning_rate; .*lr"),
        ("optimizer.tables.shop.weight_decy=1", "did you mean weight_decay"),
        ("optimizer.tables.shop.max_grad_norm=1", "max_grad_norm applies to all tables together"),
        ("optimizer.tables.shop.lr=fast", "optimizer.tables.shop.lr: .*fast"),
        ("optimizer.tables.shop.lr=0", "optimizer.tables.shop.lr must be positive"),
        ("optimizer.tables.shop=sgd", "expected optimizer.tables.shop.OPTION=VALUE"),
        ("optimizer.tables=sgd", "expected optimizer.tables.TABLE.OPTION=VALUE"),
    ],
)
def test_mistakes_are_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        section_of(override)


def collection_of(section: OptimizerConfig) -> et.EmbeddingCollection:
    names = optimizer_names(section)
    return et.EmbeddingCollection(
        [et.TableSpec(name, 10, 4, optimizer=names.get(name, "default")) for name in ("user", "shop", "tag")]
    )


def test_tables_are_trained_each_by_its_own() -> None:
    section = section_of(
        "optimizer.max_grad_norm=100.0", "optimizer.tables.shop.name=adam", "optimizer.tables.tag={name: sgd, lr: 0.5}"
    )
    tables = collection_of(section)
    optimizer = build_optimizer(section, tables)
    assert optimizer.name == "RowwiseAdagrad+Adam+SGD"
    assert optimizer.max_grad_norm == 100.0
    assert {tuple(settings["tables"]): settings["lr"] for settings in optimizer.param_groups} == {
        ("user",): 0.05,
        ("shop",): 0.001,
        ("tag",): 0.5,
    }
    assert {name: set(shard.state) for name, shard in tables.shards.items()} == {
        "user": {"accumulator"},
        "shop": {"exp_avg", "exp_avg_sq"},
        "tag": set(),
    }
    before = tables.gather_table("tag").clone()
    tables({"tag": et.Jagged.from_ids(torch.tensor([3]))})["tag"].sum().backward()
    optimizer.step()
    torch.testing.assert_close(before[3] - tables.gather_table("tag")[3], torch.full((4,), 0.5))


def test_tables_of_the_same_optimizer_share_their_exchange() -> None:
    section = section_of(
        "optimizer.tables.shop.name=adam", "optimizer.tables.user.name=adam", "optimizer.tables.tag={}"
    )
    tables = collection_of(section)
    assert [group.table_names for group in tables.table_groups] == [["user", "shop"], ["tag"]]
    assert build_optimizer(section, tables).name == "RowwiseAdagrad+Adam"


def test_all_tables_can_have_another_than_the_main_one() -> None:
    section = section_of(*(f"optimizer.tables.{name}.name=sgd" for name in ("user", "shop", "tag")))
    assert build_optimizer(section, collection_of(section)).name == "SGD"


def test_a_value_out_of_range_names_its_table() -> None:
    with pytest.raises(UserError, match=r"optimizer\.tables\.shop\.alpha must be in"):
        section_of("optimizer.tables.shop={name: rmsprop, alpha: 2.0}")
