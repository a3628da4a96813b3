"""Scores raw rows with a checkpoint of a ranking run, using only the run folder."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from embedtrain.checkpoint import CheckpointReader, LoadOptions, load_shards
from embedtrain.data.click_batches import ClickBatch, as_batch
from embedtrain.data.click_log import ClickLayout
from embedtrain.data.click_records import encode_rows
from embedtrain.data.click_schema import ClickSchema
from embedtrain.data.readers import Rows
from embedtrain.data.row_names import read_row_names
from embedtrain.data.vocabulary import WordRows
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.errors import UserError
from embedtrain.jagged import Jagged
from embedtrain.ops._backend.transfer import to_device, to_host
from embedtrain.optim.dense import load_module
from embedtrain.recipes.base import collection_options
from embedtrain.recipes.ranking.config import FeatureConfig, RankingConfig
from embedtrain.recipes.ranking.model import build_network
from embedtrain.recipes.ranking.options import click_schema, feature_options, network_options, ranking_tables
from embedtrain.spec import FeatureSpec


class SavedLayout(ClickLayout):
    """Holds the meaning of a trained run's rows, which is read without its data.

    Args:
        schema: the columns.
        state: state of a checkpoint.
    """

    def __init__(self, schema: ClickSchema, state: Mapping[str, Any]) -> None:
        self.num_rows = state["features"]
        self.dense_names = state["dense"]["columns"]
        self.dense_mean = np.array(state["dense"]["mean"], np.float64)
        self.dense_std = np.array(state["dense"]["std"], np.float64)
        self.single_names = [column.name for column in schema.single]
        self.bag_names = [column.name for column in schema.bags]


def read_vocabularies(
    run_path: str, schema: ClickSchema, state: Mapping[str, Any], num_rows: Mapping[str, int]
) -> dict[str, WordRows]:
    """Returns the vocabularies in the run folder.

    Args:
        run_path: the run folder.
        schema: the columns.
        state: of the checkpoint.
        num_rows: rows of each column's table.

    Raises:
        UserError: the run folder lacks a vocabulary, or has another one than in training.
    """
    found = {}
    for column in schema.categorical:
        if column.encoding == "vocabulary":
            names = read_row_names(run_path, state, column.name, num_rows[column.name])
            if names.noun == "row":
                raise UserError(f"{run_path}: its checkpoints do not say what the rows of {column.name} stand for")
            # Row 0 stands for all values out of the vocabulary.
            values = pa.array(names.words[1:], pa.large_string())
            found[column.name] = WordRows(values.cast(pa.large_binary()))
    return found


class ClickScorer:
    """Scores rows with a checkpoint of a ranking model, whose tables are sharded over the ranks.

    Bags are pooled at the rank of their example, so that scores do not depend on the number of ranks.

    Collective: every rank constructs one.

    Args:
        config: configuration of the run; its section `data` may describe other files.
        runtime: runtime of this process.
        checkpoint: path of the checkpoint.

    Attributes:
        schema: meaning of the columns.
        ranks: the ranks over which the tables are sharded.

    Raises:
        UserError: the run folder lacks a vocabulary.
        CheckpointError: the checkpoint does not fit the configuration.
    """

    def __init__(self, config: RankingConfig, runtime: Runtime, checkpoint: str) -> None:
        self.schema = click_schema(config.data)
        self.ranks = runtime.ranks
        with CheckpointReader(checkpoint) as reader:
            self._layout = SavedLayout(self.schema, reader.state)
            read = functools.partial(
                read_vocabularies, config.run.path, self.schema, reader.state, self._layout.num_rows
            )
            self._vocabularies = self.ranks.run_on_each(read)
            tables = ranking_tables(config, self._layout)
            options = collection_options(config, runtime, is_trained=False)
            options["wire_dtype"] = None
            features = [_feature(name, feature_options(config, name)) for name in self._layout.feature_names]
            self._tables = EmbeddingCollection(tables, features, **options)
            load_shards(reader, self._tables.shard_views(), LoadOptions(optimizer_state="reset"))
            dims = [table.dim for table in tables]
            network = build_network(len(self.schema.dense), dims, network_options(config.ranking), config.seed)
            load_module(network, reader.replicated())
        self._network = network.to(runtime.device)

    def encode(self, rows: Rows, schema: ClickSchema, where: str) -> tuple[ClickBatch, dict[int, str]]:
        """Returns the usable rows as a batch, and the reasons for bad rows by line.

        Args:
            rows: some rows of a file.
            schema: meaning of their columns; they may have no label.
            where: source of the rows, for messages.
        """
        records, wrong = encode_rows(rows, schema, self._vocabularies, where)
        return as_batch(records, self._layout, len(records.examples)), wrong

    def nothing(self) -> ClickBatch:
        """Returns an empty batch, for a rank without rows in a round."""
        no_ids = torch.zeros(0, dtype=torch.int64)
        features = {name: Jagged(no_ids, no_ids) for name in self._layout.feature_names}
        return ClickBatch(torch.zeros(0), torch.zeros(0, len(self.schema.dense)), features, 0)

    @torch.no_grad()
    def logits(self, batch: ClickBatch) -> Tensor:
        """Returns the logits [n] of a batch, on the CPU. Collective: every rank."""
        vectors = self._tables(batch.features)
        dense = to_device(batch.dense, self._tables.device)
        logits: Tensor = self._network(dense, [vectors[name] for name in self._layout.feature_names])
        return to_host(logits)


def _feature(name: str, options: FeatureConfig) -> FeatureSpec:
    return FeatureSpec(name, pooling=options.pooling if options.bag else "none", pool_at="example")
