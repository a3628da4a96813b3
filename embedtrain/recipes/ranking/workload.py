"""The workload of a ranking run, for planning."""

from __future__ import annotations

import torch

from embedtrain.errors import UserError
from embedtrain.recipes.ranking.config import FeatureConfig, RankingConfig
from embedtrain.recipes.ranking.model import build_network
from embedtrain.recipes.ranking.options import click_schema, network_options
from embedtrain.recipes.workload import IdDistribution, Sizes, Workload, dense_sizes, table_load


def workload(config: RankingConfig, sizes: Sizes) -> Workload:
    """Returns the workload of a ranking run; see `Recipe.workload`."""
    schema = click_schema(config.data)
    examples = float(config.train.global_batch_size)
    tables = []
    for column in schema.categorical:
        if column.num_rows is not None and sizes.num_rows.get(column.name, 0) not in (0, column.num_rows):
            raise UserError(
                f"the configuration gives {column.name!r} {column.num_rows:,} rows, not {sizes.num_rows[column.name]:,}"
            )
        num_rows = sizes.rows_of(column.name) if column.num_rows is None else column.num_rows
        num_ids = examples * sizes.bag_length_of(column.name) if column.is_bag else examples
        draws = ((num_ids, IdDistribution.zipf(num_rows, sizes.exponent)),)
        dim = config.data.features.get(column.name, FeatureConfig()).dim
        num_bags = examples if column.is_bag else None
        tables.append(table_load(config, column.name, num_rows, draws, dim=dim, num_bags=num_bags))
    options = network_options(config.ranking)
    with torch.device("meta"):
        network = build_network(len(schema.dense), [table.dim for table in tables], options, config.seed)
    dense_bytes, gradient_bytes = dense_sizes([network], config.dense_optimizer)
    return Workload(
        tuple(tables),
        dense_bytes=dense_bytes,
        reduced_bytes=gradient_bytes,
        # Label and dense features need 4 bytes each; ids and bag lengths 8.
        batch_bytes=round(
            4 * examples * (1 + len(schema.dense)) + 8 * sum(table.num_ids + (table.num_bags or 0) for table in tables)
        ),
    )
