"""The recipe of retrieval."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyarrow as pa
import torch

from embedtrain.checkpoint import CheckpointReader
from embedtrain.checkpoint.manifest import step_of
from embedtrain.data.interactions import (
    ITEMS_NAME,
    USERS_NAME,
    InteractionOptions,
    Interactions,
    prepare_interactions,
    read_held_out,
)
from embedtrain.data.retrieval_batches import DrawOptions, RetrievalBatches
from embedtrain.data.row_names import STATE_KEY, values_file, values_source, vocabulary_source, write_values
from embedtrain.data.side_features import SideOptions
from embedtrain.data.vector_files import check_vectors
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.export.recommendations import Recommendation
from embedtrain.export.vectors import FloatRows, Vectors, open_vectors
from embedtrain.metrics.figures import Section
from embedtrain.metrics.ranking import measure_names
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.base import (
    Grow,
    Packed,
    Recipe,
    Wanted,
    around,
    base_file,
    collection_options,
    takes_new_names,
)
from embedtrain.recipes.interactions import (
    check_data_files,
    heads_of,
    interaction_options,
    keep_interactions,
    kept_interactions,
    log_interactions,
    require_users,
    test_of,
    tuning_of,
    validation_of,
)
from embedtrain.recipes.layout import layout_of
from embedtrain.recipes.optimizers import build_dense_optimizer, build_optimizer, optimizer_names
from embedtrain.recipes.retrieval.asking import best_items, measure_unseen
from embedtrain.recipes.retrieval.config import OF_COSINES, RetrievalConfig, SideConfig
from embedtrain.recipes.retrieval.draft import draft
from embedtrain.recipes.retrieval.model import ITEM, USER, Retrieval, Scoring, Side, retrieval_tables
from embedtrain.recipes.retrieval.negative_weight import default_negative_weight
from embedtrain.recipes.retrieval.packing import packed_sides
from embedtrain.recipes.retrieval.recommendation import all_vectors, evaluate_retrieval
from embedtrain.recipes.retrieval.reporting import find_titles, recommendation_sections
from embedtrain.recipes.retrieval.workload import workload
from embedtrain.recipes.workload import Sizes
from embedtrain.spec import TableSpec
from embedtrain.storage import base_name
from embedtrain.train.checkpoints import load_weights
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Evaluation, Parts, Pretrained, Task

_logger = logging.getLogger(__name__)


def check(config: RetrievalConfig, is_new: bool) -> None:
    """Checks the files of initial vectors.

    Args:
        config: configuration of the run.
        is_new: whether the run has no checkpoint; only then are the files of `init_from` read.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    for name, side in (("users", config.users), ("items", config.items)):
        if side.init_from is not None and is_new:
            check_vectors(side.init_from, config.table.dim, f"{name}.init_from")


def prepare(config: RetrievalConfig, runtime: Runtime) -> tuple[Interactions, Sizes]:
    """Prepares the interactions of a configuration, or opens them in the cache. Collective: every rank.

    Raises:
        UserError: the data cannot be used.
    """
    interactions = prepare_interactions(
        _interaction_options(config), os.path.expanduser(config.data.cache_path), runtime.ranks
    )
    if runtime.rank == 0:
        log_interactions(interactions, config.evaluate.path, chooses_best=config.num_best is not None)
        if config.retrieval.loss == "bilateral_softmax" and config.retrieval.negative_weight is None:
            weight = _scoring(config, interactions).negative_weight
            _logger.info(f"retrieval.negative_weight is {weight:.3f}, from the skew of the items' counts")
    return interactions, _sizes(interactions)


def _interaction_options(config: RetrievalConfig) -> InteractionOptions:
    return interaction_options(
        config.data,
        config.evaluate.path,
        users=_side_options(config, config.users, "users"),
        items=_side_options(config, config.items, "items"),
        takes_new=takes_new_names(config),
    )


def _sizes(interactions: Interactions) -> Sizes:
    num_rows = {USER: len(interactions.users), ITEM: len(interactions.items)}
    bag_lengths = {}
    for side in (USER, ITEM):
        for name, (bags, num_categories) in interactions.features(f"{side}s").items():
            num_rows[f"{side}.{name}"] = num_categories
            bag_lengths[f"{side}.{name}"] = len(bags.values) / max(len(bags), 1)
    return Sizes(num_rows, bag_lengths)


def build(config: RetrievalConfig, runtime: Runtime, interactions: Interactions) -> Parts:
    """Builds the model over prepared interactions. Collective: every rank.

    Raises:
        UserError: a step is too small for the ranks.
    """
    model = _build_model(config, runtime, interactions)
    evaluation = None
    if interactions.has_validation or config.holds_out or config.evaluate.path is not None:
        if interactions.has_validation:
            held_out = validation_of(interactions)
        else:
            held_out = test_of(interactions, is_split=config.holds_out)
        measure = functools.partial(evaluate_retrieval, model, interactions.known, held_out, config.evaluate.k)
        evaluation = Evaluation(measure, config.evaluate.every_steps, config.evaluate.every_epochs)
    task = Task(
        model,
        model.tables,
        build_optimizer(config.optimizer, model.tables),
        _build_batches(config, runtime, interactions),
        dense=_build_dense_optimizer(config, model),
        evaluation=evaluation,
        unit="interactions",
        measures=[] if evaluation is None else measure_names(config.evaluate.k),
        frequencies={
            USER: torch.from_numpy(interactions.users.counts),
            ITEM: torch.from_numpy(interactions.items.counts),
        },
    )
    return Parts(
        task,
        _facts(interactions),
        functools.partial(_write_files, interactions),
        _pretrained(config, interactions),
        interactions.unverified,
    )


def _facts(interactions: Interactions) -> dict[str, Any]:
    names = {
        USER: vocabulary_source(USERS_NAME, interactions.users, USER),
        ITEM: vocabulary_source(ITEMS_NAME, interactions.items, ITEM),
    }
    names.update({table: values_source(table, values) for table, values in _categories(interactions)})
    return {"data_fingerprint": interactions.fingerprint, STATE_KEY: names}


def _categories(interactions: Interactions) -> Iterator[tuple[str, pa.Table]]:
    """Yields the table name of each feature and the categories of its rows."""
    for side in (USER, ITEM):
        for name, values in interactions.categories(f"{side}s").items():
            yield f"{side}.{name}", values


def _build_dense_optimizer(config: RetrievalConfig, model: Retrieval) -> DenseOptimizer | None:
    if not any(True for _ in model.dense.parameters()):
        return None
    return build_dense_optimizer(config.dense_optimizer, model.dense, model.tables)


def _side_options(config: RetrievalConfig, section: SideConfig, key: str) -> SideOptions:
    separators = {name: feature.separator for name, feature in section.features.items()}
    return SideOptions(
        path=section.path,
        format=section.format,
        layout=layout_of(section, key),
        id_column=section.id_column,
        separators=separators,
        base_vocabulary=base_file(config, f"{key}.tsv") or section.base_vocabulary,
        base_categories={name: url for name in separators if (url := _base_values(config, f"{key[:-1]}.{name}"))},
    )


def _base_values(config: RetrievalConfig, table: str) -> str | None:
    return base_file(config, values_file(table))


def _build_model(config: RetrievalConfig, runtime: Runtime, interactions: Interactions) -> Retrieval:
    return Retrieval(
        Side(len(interactions.users), interactions.features("users"), config.users.hidden),
        Side(len(interactions.items), interactions.features("items"), config.items.hidden),
        config.table.dim,
        _scoring(config, interactions),
        dtype=getattr(torch, config.table.dtype),
        optimizers=optimizer_names(config.optimizer),
        **collection_options(config, runtime),
    )


def _scoring(config: RetrievalConfig, interactions: Interactions) -> Scoring:
    settings = config.retrieval
    weight = settings.negative_weight
    if weight is None:
        weight = default_negative_weight(settings.loss, interactions.items.counts)
    return Scoring(
        settings.loss,
        settings.normalize,
        settings.temperature,
        settings.logq,
        settings.hard_negatives,
        weight,
        settings.margin,
    )


def _build_batches(config: RetrievalConfig, runtime: Runtime, interactions: Interactions) -> RetrievalBatches:
    if config.train.global_batch_size < runtime.world_size:
        raise UserError(
            f"a step of train.global_batch_size={config.train.global_batch_size} examples is too small for "
            f"{runtime.world_size} ranks to share"
        )
    options = DrawOptions(
        config.train.global_batch_size,
        config.train.items_per_example,
        config.retrieval.negatives,
        config.retrieval.popularity_share,
        config.retrieval.in_batch,
    )
    return RetrievalBatches(
        interactions.known,
        len(interactions.items),
        options,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        on_epoch=check_data_files(config.data, interactions, runtime.ranks),
    )


def _pretrained(config: RetrievalConfig, interactions: Interactions) -> dict[str, Pretrained]:
    found = {}
    if config.users.init_from is not None:
        found[USER] = Pretrained(config.users.init_from, lambda: interactions.users.rows)
    if config.items.init_from is not None:
        found[ITEM] = Pretrained(config.items.init_from, lambda: interactions.items.rows)
    return found


def _write_files(interactions: Interactions, folder: RunFolder) -> None:
    for table, values in _categories(interactions):
        write_values(folder.path, table, values, has_others=False)
    keep_interactions(interactions, folder)


def _tables(config: RetrievalConfig, interactions: Interactions) -> list[TableSpec]:
    return retrieval_tables(
        _sizes(interactions).num_rows,
        config.table.dim,
        getattr(torch, config.table.dtype),
        _scoring(config, interactions),
        optimizer_names(config.optimizer),
    )


def _tower_inputs(config: RetrievalConfig) -> dict[str, Any]:
    """Returns the feature columns of each tower with hidden layers, in the order of its inputs."""
    sides = {"users": config.users, "items": config.items}
    return {f"{key}.features": list(side.features) for key, side in sides.items() if side.hidden}


def _feature_tables(config: RetrievalConfig) -> list[str]:
    return [table for table in config.table_names() if table not in (USER, ITEM)]


@contextmanager
def restored(
    config: RetrievalConfig, runtime: Runtime, checkpoint: str
) -> Iterator[tuple[Retrieval, Interactions, int]]:
    """Yields the model of a checkpoint, its data and its step. Collective: every rank.

    The data come from the run folder, or are prepared again from `data.path` if the folder has none.

    Raises:
        UserError: the data cannot be used, or are not the data that the checkpoint was trained on.
        CorruptCheckpointError: the data in the run folder are damaged.
    """
    with kept_interactions(config.run.path, lambda: prepare(config, runtime)[0]) as interactions:
        model = _build_model(config, runtime, interactions)
        dense = _build_dense_optimizer(config, model)
        yield model, interactions, load_weights(checkpoint, model.tables, dense, interactions.fingerprint)


def measure(
    config: RetrievalConfig, runtime: Runtime, checkpoint: str, held_out: str | None = None
) -> dict[str, float]:
    """Measures a checkpoint on the held-out interactions in the run folder, or on the files of `held_out`.

    Collective: every rank.

    Raises:
        UserError: the run folder lacks the data, its data are not the data that the checkpoint was trained on, or the
            files cannot be used.
    """
    with restored(config, runtime, checkpoint) as (model, interactions, _):
        if held_out is None:
            require_users(interactions.held_out)
            bags = test_of(interactions, is_split=config.holds_out)
        else:
            options = replace(_interaction_options(config), held_out_path=held_out)
            bags = runtime.ranks.run_on_first(lambda: read_held_out(options, interactions))
        return evaluate_retrieval(model, interactions.known_before_test, bags, config.evaluate.k, alive=lambda: None)


def open_sides(config: RetrievalConfig, runtime: Runtime, checkpoint: str, table: str | None) -> Vectors:
    """Opens the vectors of items or users that the towers compute, by raw id.

    Args:
        config: configuration of the run.
        runtime: runtime of this process.
        checkpoint: path of the checkpoint.
        table: "item" or "user"; None for "item". For the table of a feature, its rows are opened.

    Raises:
        UserError: there is no such table, or the run folder lacks the data that the checkpoint was trained on.
    """
    side = table or ITEM
    if side not in (USER, ITEM):
        return open_vectors(config.run.path, side, step_of(base_name(checkpoint)))
    with restored(config, runtime, checkpoint) as (model, interactions, step):
        names = interactions.items if side == ITEM else interactions.users
        rows: FloatRows = all_vectors(model, side).numpy()
    with CheckpointReader(checkpoint) as reader:
        checksum = reader.manifest.checksum
    return Vectors(
        side,
        step,
        len(names),
        rows.shape[1],
        names.words,
        names.counts,
        read=lambda start, stop: rows[start:stop],
        noun=side,
        checksum=checksum,
        titles=functools.partial(find_titles, config.items if side == ITEM else config.users),
    )


def report(config: RetrievalConfig, runtime: Runtime, checkpoint: str) -> Iterator[Section]:
    """Yields measures of the recommendations by list length and by item popularity; nothing without held-out data.

    Collective: every rank.

    Raises:
        UserError: the run folder lacks the data, or has other data than the checkpoint was trained on.
    """
    if config.evaluate.path is None and not config.holds_out:
        return
    with restored(config, runtime, checkpoint) as (model, interactions, _):
        held_out = test_of(interactions, is_split=config.holds_out)
        yield from recommendation_sections(model, interactions.known_before_test, held_out, max(config.evaluate.k))


@contextmanager
def pack(config: RetrievalConfig, runtime: Runtime, checkpoint: str) -> Iterator[Packed]:
    """Yields the vectors of a checkpoint and their raw ids; see `Recipe.pack`."""
    with restored(config, runtime, checkpoint) as (model, interactions, step):
        yield packed_sides(model, interactions, step)


def recommend(
    config: RetrievalConfig, runtime: Runtime, checkpoint: str, wanted: Wanted
) -> Iterator[list[Recommendation]]:
    """Yields the best items of users. Collective: every rank.

    Args:
        config: configuration of the run.
        runtime: runtime of this process.
        checkpoint: path of the checkpoint.
        wanted: the request: users and number of items.

    Raises:
        UserError: a user or an item is unknown, or the run folder lacks the data that the checkpoint was trained on.
    """
    with restored(config, runtime, checkpoint) as (model, interactions, _):
        yield from best_items(model, interactions, _interaction_options(config), wanted, checkpoint)


def measure_new_users(
    config: RetrievalConfig, runtime: Runtime, checkpoint: str, path: str, fraction: float
) -> dict[str, float]:
    """Measures a checkpoint on users who are not in the training data; see `measure_unseen`. Collective: every rank."""
    options = replace(_interaction_options(config), held_out_path=path)
    with restored(config, runtime, checkpoint) as (model, interactions, _):
        return measure_unseen(config, model, interactions, options, fraction)


def _search_space(config: RetrievalConfig) -> dict[str, str]:
    settings, epochs = config.retrieval, config.train.epochs
    space = {
        "optimizer.lr": around(config.optimizer.lr, 3),
        "train.epochs": f"{max(1, epochs // 2)},{epochs},{2 * epochs}",
    }
    if settings.loss not in OF_COSINES:
        space["retrieval.temperature"] = around(settings.temperature, 2)
    if settings.loss == "bilateral_softmax":
        space["retrieval.negative_weight"] = "0.8:1.5"
    elif settings.loss in OF_COSINES:
        weight = settings.negative_weight or (100.0 if settings.loss == "cosine_contrastive" else 1.0)
        space["retrieval.negative_weight"] = around(weight, 4)
    return space


RECIPE = Recipe(
    config=RetrievalConfig,
    prepare=prepare,
    build=build,
    workload=workload,
    heads=lambda config: heads_of(config.data),
    check=check,
    draft=draft,
    held_out="evaluate.path",
    grow=Grow(
        base_files=lambda config: [USERS_NAME, ITEMS_NAME, *map(values_file, _feature_tables(config))],
        tables=_tables,
        facts=lambda config, interactions: _facts(interactions),
        write_files=lambda config, interactions, folder: _write_files(interactions, folder),
        lasting=("users.hidden ", "items.hidden ", "users.features", "items.features", "retrieval.normalize "),
        inputs=_tower_inputs,
    ),
    measure=measure,
    measure_new_users=measure_new_users,
    open=open_sides,
    recommend=recommend,
    pack=pack,
    report=report,
    tuning=tuning_of(_search_space),
)
