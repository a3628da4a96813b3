"""The workload of a SASRec run, for planning."""

from __future__ import annotations

from dataclasses import replace

import torch

from embedtrain.recipes.sasrec.config import ITEM, SasrecConfig
from embedtrain.recipes.sasrec.encoder import Encoder
from embedtrain.recipes.workload import Draws, IdDistribution, Sizes, Workload, dense_sizes, table_load


def workload(config: SasrecConfig, sizes: Sizes) -> Workload:
    """Returns the workload of a SASRec run; see `Recipe.workload`."""
    settings, dim, num_parts = config.sasrec, config.table.dim, config.train.accumulate_steps
    predictions, items = float(config.train.global_batch_size), sizes.ids_of(ITEM)
    draws: tuple[Draws, ...] = ((predictions, items),)
    is_full = settings.loss == "full_softmax"
    shared = predictions
    if not is_full:
        # Each micro-batch looks up all negatives.
        shared = float(settings.negatives * num_parts)
        drawn = IdDistribution.of_weights(items.shares**settings.power, items.num_rows)
        draws = ((2 * predictions, items), (shared, drawn))
    table = replace(table_load(config, ITEM, sizes.rows_of(ITEM), draws), is_scored_whole=is_full)
    with torch.device("meta"):
        network = Encoder(dim, settings.max_length, settings.layers, settings.heads, config.inner)
    dense_bytes, gradient_bytes = dense_sizes([network], config.dense_optimizer)
    return Workload(
        (table,),
        dense_bytes=dense_bytes,
        # Encoded sequences or negatives are sent to all ranks, and their gradients are returned.
        reduced_bytes=gradient_bytes + round(4 * shared * dim),
        # 8 bytes for the id of each look-up, and for the target and the place of each prediction.
        batch_bytes=round(8 * (2 * predictions + table.num_ids)),
    )
