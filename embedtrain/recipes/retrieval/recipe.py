"""A run of retrieval from its configuration, and a trained one from its folder."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from embedtrain.checkpoint import CheckpointReader, LoadOptions, latest_checkpoint, load_shards
from embedtrain.data.columns import TABLE_SUFFIXES
from embedtrain.data.interactions import InteractionOptions, Interactions, SideOptions, prepare_interactions
from embedtrain.data.retrieval_batches import DrawOptions, RetrievalBatches
from embedtrain.data.sources import refuse_changes
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.recipes.base import Check, Parts, Pretrained, Sizes, collection_options, no_check
from embedtrain.recipes.optimizers import build_dense_optimizer, build_optimizer, optimizer_names
from embedtrain.recipes.retrieval.config import RetrievalConfig, SideConfig
from embedtrain.recipes.retrieval.model import ITEM, USER, Retrieval, Scoring, Side
from embedtrain.recipes.retrieval.recommendation import evaluate_retrieval
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Evaluation, Task

_logger = logging.getLogger(__name__)


def build_retrieval(config: RetrievalConfig, runtime: Runtime, check: Check = no_check) -> Parts:
    """Prepares the interactions and builds the model. Collective: every rank.

    Args:
        config: of the run.
        runtime: of this process.
        check: called once the data are known.

    Raises:
        UserError: the data cannot be used, or a step is too small for the ranks.
    """
    interactions = prepare_data(config, runtime)
    check(_sizes(interactions))
    model = _build_model(config, runtime, interactions)
    has_dense = any(True for _ in model.dense.parameters())
    evaluation = None
    if config.evaluate.path is not None:
        measure = functools.partial(_measure, config, model, interactions)
        evaluation = Evaluation(measure, config.evaluate.every_steps, config.evaluate.every_epochs)
    task = Task(
        model,
        model.tables,
        build_optimizer(config.optimizer, model.tables),
        _build_batches(config, runtime, interactions),
        dense=build_dense_optimizer(config.dense_optimizer, model.dense, model.tables) if has_dense else None,
        evaluation=evaluation,
        unit="interactions",
        frequencies={
            USER: torch.from_numpy(interactions.users.counts),
            ITEM: torch.from_numpy(interactions.items.counts),
        },
    )
    facts = {"data_fingerprint": interactions.fingerprint}
    return Parts(task, facts, functools.partial(_write_ids, interactions), _pretrained(config, interactions))


@dataclass(frozen=True)
class TrainedRetrieval:
    """A trained model with the data it was trained on.

    Attributes:
        model: restored from the newest checkpoint.
        interactions: the raw ids, and what each user is known to have.
        step: optimizer steps done.
        measure: measures on the held-out data of the configuration; None where it names none. Collective.
    """

    model: Retrieval
    interactions: Interactions
    step: int
    measure: Callable[[], dict[str, float]] | None


def open_retrieval(config: RetrievalConfig, runtime: Runtime) -> TrainedRetrieval:
    """Restores the model of the newest checkpoint in `config.run.path`. Collective: every rank.

    Raises:
        UserError: there is no checkpoint, or the data are not those that it was trained on.
    """
    folder = RunFolder(config.run.path)
    path = latest_checkpoint(folder.checkpoints_path)
    if path is None:
        raise UserError(f"no complete checkpoint yet in {folder.path!r}; train until the first one is saved")
    interactions = prepare_data(config, runtime)
    model = _build_model(config, runtime, interactions)
    with CheckpointReader(path) as reader:
        if reader.state["data_fingerprint"] != interactions.fingerprint:
            raise UserError(
                f"{path} was trained on other data than data.path={config.data.path} holds now: the rows of its "
                "users and items are not those of these files"
            )
        load_shards(reader, model.tables.shard_views(), LoadOptions(optimizer_state="reset"))
        if any(True for _ in model.dense.parameters()):
            dense = build_dense_optimizer(config.dense_optimizer, model.dense, model.tables)
            dense.load_tensors(reader.replicated(), with_state=False)
        step = reader.step
    measure = None
    if config.evaluate.path is not None:
        measure = functools.partial(_measure, config, model, interactions, lambda: None)
    return TrainedRetrieval(model, interactions, step, measure)


def _sizes(interactions: Interactions) -> Sizes:
    num_rows = {USER: len(interactions.users), ITEM: len(interactions.items)}
    bag_lengths = {}
    for side in (USER, ITEM):
        for name, (bags, num_categories) in interactions.features(f"{side}s").items():
            num_rows[f"{side}.{name}"] = num_categories
            bag_lengths[f"{side}.{name}"] = len(bags.values) / max(len(bags), 1)
    return Sizes(num_rows, bag_lengths)


def prepare_data(config: RetrievalConfig, runtime: Runtime) -> Interactions:
    """Prepares the interactions of a configuration, or finds them in the cache. Collective: every rank."""
    options = InteractionOptions(
        path=config.data.path,
        format=config.data.format,
        user_column=config.data.user_column,
        item_column=config.data.item_column,
        held_out_path=config.evaluate.path,
        users=_side_options(config.users),
        items=_side_options(config.items),
    )
    interactions = prepare_interactions(options, os.path.expanduser(config.data.cache_path), runtime.ranks)
    if runtime.rank == 0:
        _logger.info(
            f"{interactions.num_interactions:,} interactions of {len(interactions.users):,} users with "
            f"{len(interactions.items):,} items, in {interactions.path}"
        )
        for what, number in interactions.left_out.items():
            if number:
                _logger.warning(f"{number:,} {what.replace('_', ' ')}")
    return interactions


def _side_options(section: SideConfig) -> SideOptions:
    separators = {name: feature.separator for name, feature in section.features.items()}
    return SideOptions(
        path=section.path,
        format=section.format,
        id_column=section.id_column,
        separators=separators,
        base_vocabulary=section.base_vocabulary,
    )


def _build_model(config: RetrievalConfig, runtime: Runtime, interactions: Interactions) -> Retrieval:
    settings = config.retrieval
    return Retrieval(
        Side(len(interactions.users), interactions.features("users"), config.users.hidden),
        Side(len(interactions.items), interactions.features("items"), config.items.hidden),
        config.table.dim,
        Scoring(
            settings.loss,
            settings.similarity,
            settings.temperature,
            settings.logq,
            settings.margin,
            settings.negative_weight,
        ),
        dtype=getattr(torch, config.table.dtype),
        optimizers=optimizer_names(config.optimizer),
        **collection_options(config.table, runtime, config.seed),
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
        config.retrieval.power,
        config.retrieval.in_batch,
    )
    check_files = functools.partial(refuse_changes, config.data.path, TABLE_SUFFIXES, interactions.source_identities)
    return RetrievalBatches(
        interactions.known,
        len(interactions.items),
        options,
        seed=config.seed,
        rank=runtime.rank,
        world_size=runtime.world_size,
        on_epoch=lambda: runtime.ranks.run_on_first(check_files),
    )


def _measure(
    config: RetrievalConfig, model: Retrieval, interactions: Interactions, alive: Callable[[], None]
) -> dict[str, float]:
    return evaluate_retrieval(model, interactions.known, interactions.held_out, config.evaluate.k, alive)


def _pretrained(config: RetrievalConfig, interactions: Interactions) -> dict[str, Pretrained]:
    found = {}
    if config.users.init_from is not None:
        found[USER] = Pretrained(config.users.init_from, lambda: interactions.users.rows)
    if config.items.init_from is not None:
        found[ITEM] = Pretrained(config.items.init_from, lambda: interactions.items.rows)
    return found


def _write_ids(interactions: Interactions, folder: RunFolder) -> None:
    folder.write_vocabulary(interactions.users, f"{USER}s.tsv")
    folder.write_vocabulary(interactions.items, f"{ITEM}s.tsv")
