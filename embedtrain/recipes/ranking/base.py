"""Reads and writes the vocabularies and means that a ranking run takes from the run in `start_from`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedtrain import storage
from embedtrain.data.prepare_clicks import ClickBase
from embedtrain.data.row_names import values_file
from embedtrain.data.vocabulary import COUNTS_SCHEMA
from embedtrain.errors import UserError
from embedtrain.recipes.base import base_file, takes_new_names
from embedtrain.recipes.ranking.config import RankingConfig
from embedtrain.recipes.ranking.options import click_schema
from embedtrain.schema import Number, SchemaError, parse

_DENSE_NAME = "dense.json"


@dataclass(frozen=True)
class _Dense:
    """Holds the dense columns of the other run with their means and standard deviations."""

    columns: list[str]
    transform: str
    mean: list[Number]
    std: list[Number]


def base_files(config: RankingConfig) -> list[str]:
    """Returns the files of a run folder that hold the vocabularies."""
    return [values_file(name) for name in _with_vocabulary(config)]


def write_base(config: RankingConfig, state: Mapping[str, Any]) -> None:
    """Writes the means and standard deviations of the dense columns, with which the network was trained."""
    url = base_file(config, _DENSE_NAME)
    assert url is not None
    storage.make_folder(url.rpartition("/")[0])
    storage.replace(url, json.dumps(state["dense"]).encode(), f"{url}.tmp")


def read_base(config: RankingConfig) -> ClickBase | None:
    """Returns the other run's vocabularies, means and deviations; None if the run does not start from another run.

    Raises:
        UserError: a file is missing or damaged, or the dense columns differ.
    """
    url = base_file(config, _DENSE_NAME)
    if url is None:
        return None
    try:
        dense = parse(_Dense, json.loads(storage.read(url)))
        vocabularies = {name: _read_values(config, name) for name in _with_vocabulary(config)}
    except (FileNotFoundError, SchemaError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"{config.run.path}: cannot read the files that were copied from {config.start_from}: {error}"
        ) from error
    columns = list(click_schema(config.data).dense)
    if (dense.columns, dense.transform) != (columns, config.data.dense_transform):
        raise UserError(
            f"start_from={config.start_from}: its network has the inputs data.dense={dense.columns} with "
            f"data.dense_transform={dense.transform}, but this run has {columns} with {config.data.dense_transform}"
        )
    return ClickBase(vocabularies, np.array(dense.mean), np.array(dense.std), takes_new_names(config))


def _with_vocabulary(config: RankingConfig) -> list[str]:
    return [column.name for column in click_schema(config.data).categorical if column.encoding == "vocabulary"]


def _read_values(config: RankingConfig, name: str) -> pa.Table:
    url = base_file(config, values_file(name))
    assert url is not None
    found = pq.read_table(pa.BufferReader(storage.read(url)), columns=["value", "count"])
    values = found["value"].cast(pa.large_string()).cast(pa.large_binary())
    return pa.table([values, found["count"]], schema=COUNTS_SCHEMA)
