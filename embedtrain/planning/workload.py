"""What each model asks of its machines, from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from embedtrain.config.sections import Config
from embedtrain.data.negatives import NUM_COMMON_WORDS, num_parts_of
from embedtrain.data.skipgram import keep_shares
from embedtrain.errors import UserError
from embedtrain.recipes.ranking.config import FeatureConfig, RankingConfig
from embedtrain.recipes.ranking.model import NetworkOptions, build_network
from embedtrain.recipes.ranking.recipe import click_schema
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.retrieval.model import ITEM, USER, perceptron
from embedtrain.recipes.word2vec.config import Word2VecConfig
from embedtrain.recipes.word2vec.model import INPUT, OUTPUT
from embedtrain.recipes.workload import (
    Assumptions,
    Draws,
    IdDistribution,
    TableLoad,
    Workload,
    dense_sizes,
    table_load,
)


def workload_of(config: Config, assumptions: Assumptions) -> Workload:
    """Returns what a run asks of its machines.

    Raises:
        UserError: something is unknown, or rows are given for a table that does not exist.
    """
    of_model = next(function for kind, function in _WORKLOADS.items() if isinstance(config, kind))
    section = config.checkpoint
    return replace(
        of_model(config, assumptions),
        save_bytes=section.max_extra_memory_bytes if section.mode == "async" else 0,
        num_checkpoints=1 + (section.keep_last or 1) + (section.keep_best or 0),
    )


def word2vec_workload(config: Word2VecConfig, assumptions: Assumptions) -> Workload:
    """Returns the workload of word vectors; see `workload_of`."""
    assumptions.require_known([INPUT, OUTPUT])
    settings = config.word2vec
    num_rows = assumptions.rows_of(INPUT)
    if assumptions.rows_of(OUTPUT) != num_rows:
        raise UserError("both tables of word2vec have one row per word: give the same --rows for both, or --rows N")
    text = assumptions.ids_of(INPUT)
    kept, share_kept = text.thinned(lambda shares: keep_shares(shares, settings.sample))
    num_words = config.train.words_per_step * share_kept
    words: Draws = (num_words, kept)
    num_parts = num_parts_of(num_rows, settings.negative_parts)
    weighted = IdDistribution.of_weights(text.shares**settings.power, text.num_rows)
    negatives, home_negatives = _negatives(num_words * settings.negatives, weighted, num_parts)
    output = table_load(config, OUTPUT, num_rows, (words, *negatives))
    return Workload(
        (
            table_load(config, INPUT, num_rows, (words,)),
            replace(output, home_draws=home_negatives, home_parts=num_parts),
        ),
        # For each kept word 8 bytes each: the word, both ends of its window, and its targets.
        batch_bytes=round(num_words * 8 * (3 + 1 + settings.negatives)),
    )


def _negatives(number: float, ids: IdDistribution, num_parts: int) -> tuple[tuple[Draws, ...], tuple[Draws, ...]]:
    """Returns the negatives drawn from words that all parts have, and from words of one part: see `part_vocabulary`."""
    if num_parts == 1:
        return ((number, ids),), ()
    is_common = ids.num_rows.cumsum() <= NUM_COMMON_WORDS
    common, share = ids.thinned(lambda _: is_common.astype(float))
    others, _ = ids.thinned(lambda _: (~is_common).astype(float))
    return ((number * share, common),), ((number * (1 - share), others),)


def ranking_workload(config: RankingConfig, assumptions: Assumptions) -> Workload:
    """Returns the workload of a ranking model; see `workload_of`."""
    schema = click_schema(config.data)
    assumptions.require_known([column.name for column in schema.categorical])
    examples = float(config.train.global_batch_size)
    tables = []
    for column in schema.categorical:
        if column.num_rows is not None and assumptions.num_rows.get(column.name, 0) not in (0, column.num_rows):
            raise UserError(f"the configuration gives {column.name!r} {column.num_rows:,} rows: leave out its --rows")
        num_rows = assumptions.rows_of(column.name) if column.num_rows is None else column.num_rows
        num_ids = examples * assumptions.bag_length_of(column.name) if column.is_bag else examples
        draws = ((num_ids, IdDistribution.zipf(num_rows, assumptions.exponent)),)
        dim = config.data.features.get(column.name, FeatureConfig()).dim
        num_bags = examples if column.is_bag else None
        tables.append(table_load(config, column.name, num_rows, draws, dim=dim, num_bags=num_bags))
    options = NetworkOptions(
        architecture=config.ranking.architecture,
        bottom=tuple(config.ranking.bottom),
        top=tuple(config.ranking.top),
        num_cross_layers=config.ranking.num_cross_layers,
        low_rank=config.ranking.low_rank,
    )
    with torch.device("meta"):
        network = build_network(len(schema.dense), [table.dim for table in tables], options, config.seed)
    dense_bytes, gradient_bytes = dense_sizes([network], config.dense_optimizer)
    return Workload(
        tuple(tables),
        dense_bytes=dense_bytes,
        reduced_bytes=gradient_bytes,
        # The label and the dense features take 4 bytes each, ids and lengths of bags 8.
        batch_bytes=round(
            4 * examples * (1 + len(schema.dense)) + 8 * sum(table.num_ids + (table.num_bags or 0) for table in tables)
        ),
    )


def retrieval_workload(config: RetrievalConfig, assumptions: Assumptions) -> Workload:
    """Returns the workload of retrieval; see `workload_of`."""
    sides = {USER: config.users, ITEM: config.items}
    features = {side: {f"{side}.{name}": f for name, f in section.features.items()} for side, section in sides.items()}
    assumptions.require_known([name for side in sides for name in (side, *features[side])])
    settings, dim = config.retrieval, config.table.dim
    users = float(config.train.global_batch_size)
    positives = users * config.train.items_per_example
    items = assumptions.ids_of(ITEM)
    negatives = (float(settings.negatives), IdDistribution.of_weights(items.shares**settings.power, items.num_rows))
    draws: dict[str, tuple[Draws, ...]] = {
        USER: ((users, IdDistribution.zipf(assumptions.rows_of(USER), 0.0)),),
        ITEM: ((positives, items), negatives),
    }
    tables: list[TableLoad] = []
    for side in sides:
        num_vectors = sum(number for number, _ in draws[side])
        tables.append(table_load(config, side, assumptions.rows_of(side), draws[side]))
        for table, feature in features[side].items():
            # Each id that is looked up brings one bag of categories.
            length = assumptions.bag_length_of(table) if feature.separator is not None else 1.0
            categories = ((num_vectors * length, assumptions.ids_of(table)),)
            tables.append(table_load(config, table, assumptions.rows_of(table), categories, num_bags=num_vectors))
    with torch.device("meta"):
        towers = [
            perceptron((1 + len(section.features)) * dim, section.hidden, dim)
            for section in sides.values()
            if section.hidden
        ]
    dense_bytes, gradient_bytes = dense_sizes(list(towers), config.dense_optimizer)
    candidates = settings.negatives + (positives if settings.in_batch else 0.0)
    return Workload(
        tuple(tables),
        dense_bytes=dense_bytes,
        # The candidates' vectors go to all ranks and their gradients come back, as the dense gradients do.
        reduced_bytes=gradient_bytes + round(4 * candidates * dim),
        # 8 bytes each: an id of every look-up, and the user of every positive.
        batch_bytes=round(8 * (positives + sum(table.num_ids for table in tables))),
    )


_WORKLOADS: dict[type[Config], Callable[[Any, Assumptions], Workload]] = {
    Word2VecConfig: word2vec_workload,
    RankingConfig: ranking_workload,
    RetrievalConfig: retrieval_workload,
}
"""The function of each model, by its configuration."""
