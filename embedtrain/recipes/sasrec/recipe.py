"""The recipe of SASRec."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from embedtrain.data.interactions import (
    ITEMS_NAME,
    InteractionOptions,
    Interactions,
    prepare_interactions,
    read_held_out,
)
from embedtrain.data.readers import AUTO, Layout
from embedtrain.data.row_names import STATE_KEY, vocabulary_source
from embedtrain.data.side_features import SideOptions
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.export.recommendations import Recommendation
from embedtrain.recipes.base import (
    Grow,
    Packed,
    Recipe,
    Wanted,
    around,
    base_file,
    collection_options,
    table_spec,
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
    tuning_of,
)
from embedtrain.recipes.lists import names_of_next
from embedtrain.recipes.optimizers import build_dense_optimizer, build_optimizer
from embedtrain.recipes.sasrec.batches import BatchOptions, SequenceBatches
from embedtrain.recipes.sasrec.config import ITEM, SasrecConfig
from embedtrain.recipes.sasrec.draft import draft
from embedtrain.recipes.sasrec.histories import evaluate_next, histories_before_test, next_items
from embedtrain.recipes.sasrec.model import Architecture, Sasrec
from embedtrain.recipes.sasrec.packing import packed_model
from embedtrain.recipes.sasrec.workload import workload
from embedtrain.recipes.workload import Sizes
from embedtrain.spec import TableSpec
from embedtrain.train.checkpoints import load_weights
from embedtrain.train.task import Evaluation, Parts, Task

_INIT_SCALE = 0.02


def prepare(config: SasrecConfig, runtime: Runtime) -> tuple[Interactions, Sizes]:
    """Prepares the interactions of a configuration, or opens them in the cache. Collective: every rank.

    Raises:
        UserError: the data cannot be used, or no user has two items.
    """
    interactions = prepare_interactions(_options(config), os.path.expanduser(config.data.cache_path), runtime.ranks)
    if runtime.rank == 0:
        log_interactions(interactions, config.evaluate.path, chooses_best=config.num_best is not None)
    if np.diff(interactions.sequences.starts).max(initial=0) < 2:
        raise UserError(
            f"{config.data.path}: no user has two items or more to train on, so there is nothing to predict"
            f"{': data.split and data.validation hold out the newest items' if interactions.split_files else ''}"
        )
    return interactions, Sizes({ITEM: len(interactions.items)})


def _options(config: SasrecConfig) -> InteractionOptions:
    # Users have no rows in a table, so the users of a run in `start_from` are not needed.
    return interaction_options(
        config.data,
        config.evaluate.path,
        users=SideOptions(format=AUTO, layout=Layout()),
        items=SideOptions(format=AUTO, layout=Layout(), base_vocabulary=base_file(config, ITEMS_NAME)),
        takes_new=takes_new_names(config),
        keeps_order=True,
    )


def build(config: SasrecConfig, runtime: Runtime, interactions: Interactions) -> Parts:
    """Builds the model over prepared interactions. Collective: every rank."""
    model = _build_model(config, runtime, interactions)
    evaluation = None
    if interactions.has_validation or config.holds_out or config.evaluate.path is not None:
        # In both cases the training sequences are the histories: without a validation part, the test part follows them.
        held_out = interactions.validation if interactions.has_validation else interactions.held_out
        measure = functools.partial(evaluate_next, model, interactions.sequences, held_out, config.evaluate.k)
        evaluation = Evaluation(measure, config.evaluate.every_steps, config.evaluate.every_epochs)
    settings = config.sasrec
    batches = SequenceBatches(
        interactions.sequences,
        len(interactions.items),
        BatchOptions(
            config.train.global_batch_size,
            settings.max_length,
            settings.negatives if settings.loss == "sampled_softmax" else 0,
            settings.power,
        ),
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        on_epoch=check_data_files(config.data, interactions, runtime.ranks),
    )
    task = Task(
        model,
        model.tables,
        build_optimizer(config.optimizer, model.tables),
        batches,
        dense=build_dense_optimizer(config.dense_optimizer, model.dense, model.tables),
        evaluation=evaluation,
        unit="predictions",
        measures=[] if evaluation is None else names_of_next(config.evaluate.k),
        frequencies={ITEM: torch.from_numpy(interactions.items.counts)},
    )
    write_files = functools.partial(keep_interactions, interactions)
    return Parts(task, _facts(interactions), write_files, unverified=interactions.unverified)


def _fingerprint(interactions: Interactions) -> str:
    return f"{interactions.fingerprint}-{interactions.order_fingerprint}"


def _facts(interactions: Interactions) -> dict[str, Any]:
    names = {ITEM: vocabulary_source(ITEMS_NAME, interactions.items, ITEM)}
    return {"data_fingerprint": _fingerprint(interactions), STATE_KEY: names}


def _table(config: SasrecConfig, interactions: Interactions) -> TableSpec:
    return table_spec(config, ITEM, len(interactions.items), init="normal", init_scale=_INIT_SCALE)


def _build_model(config: SasrecConfig, runtime: Runtime, interactions: Interactions) -> Sasrec:
    settings = config.sasrec
    architecture = Architecture(
        settings.max_length, settings.layers, settings.heads, config.inner, settings.dropout, settings.loss
    )
    return Sasrec(_table(config, interactions), architecture, **collection_options(config, runtime))


@contextmanager
def restored(config: SasrecConfig, runtime: Runtime, checkpoint: str) -> Iterator[tuple[Sasrec, Interactions, int]]:
    """Yields the model of a checkpoint, its data and its step. Collective: every rank.

    Raises:
        UserError: the data cannot be used, or are not the data that the checkpoint was trained on.
        CorruptCheckpointError: the data in the run folder are damaged.
    """
    with kept_interactions(config.run.path, lambda: prepare(config, runtime)[0]) as interactions:
        model = _build_model(config, runtime, interactions)
        dense = build_dense_optimizer(config.dense_optimizer, model.dense, model.tables)
        yield model, interactions, load_weights(checkpoint, model.tables, dense, _fingerprint(interactions))


def measure(
    config: SasrecConfig, runtime: Runtime, checkpoint: str, held_out: str | None = None
) -> Mapping[str, float]:
    """Measures a checkpoint on the test part in the run folder, or on the files of `held_out`. Collective: every rank.

    Raises:
        UserError: the run folder lacks the data, its data are not the data that the checkpoint was trained on, or the
            files cannot be used.
    """
    with restored(config, runtime, checkpoint) as (model, interactions, _):
        if held_out is None:
            bags = require_users(interactions.held_out)
        else:
            options = replace(_options(config), held_out_path=held_out)
            bags = runtime.ranks.run_on_first(lambda: read_held_out(options, interactions))
        histories = histories_before_test(interactions)
        return evaluate_next(model, histories, bags, config.evaluate.k, alive=lambda: None)


def recommend(
    config: SasrecConfig, runtime: Runtime, checkpoint: str, wanted: Wanted
) -> Iterator[list[Recommendation]]:
    """Yields the predicted next items of users; see `next_items`. Collective: every rank."""
    with restored(config, runtime, checkpoint) as (model, interactions, _):
        yield from next_items(model, interactions, _options(config), wanted)


@contextmanager
def pack(config: SasrecConfig, runtime: Runtime, checkpoint: str) -> Iterator[Packed]:
    """Yields the model of a checkpoint; see `Recipe.pack`."""
    with restored(config, runtime, checkpoint) as (model, interactions, step):
        yield packed_model(model, interactions, step)


def _search_space(config: SasrecConfig) -> dict[str, str]:
    return {
        "optimizer.lr": around(config.optimizer.lr, 3),
        "dense_optimizer.lr": around(config.dense_optimizer.lr, 3),
        "sasrec.dropout": "0.1:0.5",
    }


RECIPE = Recipe(
    config=SasrecConfig,
    prepare=prepare,
    build=build,
    workload=workload,
    heads=lambda config: heads_of(config.data),
    held_out="evaluate.path",
    grow=Grow(
        base_files=lambda config: [ITEMS_NAME],
        tables=lambda config, interactions: [_table(config, interactions)],
        facts=lambda config, interactions: _facts(interactions),
        write_files=lambda config, interactions, folder: keep_interactions(interactions, folder),
        lasting=("sasrec.max_length ", "sasrec.layers ", "sasrec.heads ", "sasrec.inner "),
    ),
    measure=measure,
    recommend=recommend,
    pack=pack,
    tuning=tuning_of(_search_space),
    draft=draft,
)
