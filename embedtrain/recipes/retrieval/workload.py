"""The workload of a retrieval run, for planning."""

from __future__ import annotations

import torch

from embedtrain.data.retrieval_batches import negative_shares
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.retrieval.model import ITEM, USER, perceptron
from embedtrain.recipes.workload import (
    Draws,
    IdDistribution,
    Sizes,
    TableLoad,
    Workload,
    dense_sizes,
    table_load,
)


def workload(config: RetrievalConfig, sizes: Sizes) -> Workload:
    """Returns the workload of a retrieval run; see `Recipe.workload`."""
    sides = {USER: config.users, ITEM: config.items}
    features = {side: {f"{side}.{name}": f for name, f in section.features.items()} for side, section in sides.items()}
    settings, dim = config.retrieval, config.table.dim
    users = float(config.train.global_batch_size)
    positives = users * config.train.items_per_example
    items, num_parts = sizes.ids_of(ITEM), config.train.accumulate_steps
    # Each micro-batch looks up all candidates, because it is scored against all of them.
    again = positives * num_parts if settings.in_batch and num_parts > 1 else 0.0
    negatives = (
        float(settings.negatives * num_parts),
        IdDistribution(
            negative_shares(items.shares, int(items.num_rows.sum()), settings.popularity_share), items.num_rows
        ),
    )
    draws: dict[str, tuple[Draws, ...]] = {
        USER: ((users, IdDistribution.zipf(sizes.rows_of(USER), 0.0)),),
        ITEM: ((positives + again, items), negatives),
    }
    tables: list[TableLoad] = []
    for side in sides:
        num_vectors = sum(number for number, _ in draws[side])
        tables.append(table_load(config, side, sizes.rows_of(side), draws[side]))
        for table, feature in features[side].items():
            # Each looked-up id needs one bag of categories.
            length = sizes.bag_length_of(table) if feature.separator is not None else 1.0
            categories = ((num_vectors * length, sizes.ids_of(table)),)
            tables.append(table_load(config, table, sizes.rows_of(table), categories, num_bags=num_vectors))
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
        # The candidates' vectors are sent to all ranks and their gradients are returned, like the dense gradients.
        reduced_bytes=gradient_bytes + round(4 * candidates * dim) * num_parts,
        # 8 bytes for the id of each look-up, and for the user of each positive.
        batch_bytes=round(8 * (positives + sum(table.num_ids for table in tables))),
    )
