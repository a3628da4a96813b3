"""Contents of the package of a ranking model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from embedtrain.checkpoint import CheckpointReader
from embedtrain.data.click_schema import CRITEO
from embedtrain.distributed.runtime import Runtime
from embedtrain.optim.dense import load_module
from embedtrain.recipes.base import NETWORK_NAME, Packed, PackedNetwork, PackedTable, table_blocks
from embedtrain.recipes.ranking.config import RankingConfig
from embedtrain.recipes.ranking.model import build_network
from embedtrain.recipes.ranking.options import click_schema, feature_options, network_options, ranking_tables
from embedtrain.recipes.ranking.scoring import SavedLayout, read_vocabularies


@contextmanager
def pack(config: RankingConfig, runtime: Runtime, checkpoint: str) -> Iterator[Packed]:
    """Yields the model of a checkpoint; see `Recipe.pack`.

    Raises:
        UserError: the run folder lacks a vocabulary.
    """
    with CheckpointReader(checkpoint) as reader:
        parts = _Ranking(config, reader)
        features = parts.features()
        yield Packed(
            model="ranking",
            step=reader.step,
            facts=parts.facts(),
            tables={
                facts["table"]: PackedTable(spec.num_rows, spec.dim, functools.partial(table_blocks, reader, spec))
                for facts, spec in zip(features, parts.tables, strict=True)
            },
            texts={
                facts["vocabulary"]: parts.vocabularies[facts["name"]].words
                for facts in features
                if facts["vocabulary"] is not None
            },
            network=PackedNetwork(
                parts.network,
                (torch.zeros(3, len(parts.schema.dense)), [torch.zeros(3, dim) for dim in parts.dims]),
                ["numbers", *(f"vectors.{column.name}" for column in parts.columns)],
            ),
        )


class _Ranking:
    """Holds the parts of a ranking model."""

    def __init__(self, config: RankingConfig, reader: CheckpointReader) -> None:
        self.schema = click_schema(config.data)
        self.layout = SavedLayout(self.schema, reader.state)
        self.columns = (*self.schema.single, *self.schema.bags)
        self.tables = ranking_tables(config, self.layout)
        self.dims = [spec.dim for spec in self.tables]
        self.vocabularies = read_vocabularies(config.run.path, self.schema, reader.state, self.layout.num_rows)
        self.pooling = {column.name: feature_options(config, column.name).pooling for column in self.columns}
        self.network = build_network(len(self.schema.dense), self.dims, network_options(config.ranking), config.seed)
        load_module(self.network, reader.replicated())

    def features(self) -> list[dict[str, Any]]:
        """Returns the manifest's entries of the categorical columns, in the order of the network's arguments."""
        return [
            {
                "name": column.name,
                "table": f"table-{number:03d}.safetensors",
                "vocabulary": f"vocabulary-{number:03d}.safetensors" if column.encoding == "vocabulary" else None,
                "encoding": column.encoding,
                "num_rows": spec.num_rows,
                "bag": column.is_bag,
                "separator": column.separator,
                "pooling": self.pooling[column.name],
                "hexadecimal": self.schema.file_format == CRITEO and not column.is_bag,
            }
            for number, (column, spec) in enumerate(zip(self.columns, self.tables, strict=True))
        ]

    def facts(self) -> dict[str, Any]:
        """Returns the manifest's entries about parsing and encoding rows."""
        schema, layout = self.schema, self.layout
        quoting = schema.layout.quoting(schema.delimiter)
        return {
            "network": NETWORK_NAME,
            "lines": {
                "format": schema.reader,
                "columns": schema.columns,
                "delimiter": schema.delimiter,
                "quote": None if quoting is None else quoting.quote,
            },
            "dense": schema.dense,
            "dense_transform": schema.dense_transform,
            "dense_mean": layout.dense_mean.tolist(),
            "dense_std": layout.dense_std.tolist(),
            "features": self.features(),
        }
