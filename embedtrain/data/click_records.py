"""Encoding parsed examples as records of a prepared click log, and computing the moments of its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedtrain.data.click_log import BAG_LENGTHS, DENSE, FIRST_VALUE, IDS, LABEL, Records, record_dtype
from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.click_values import Examples, parse_rows
from embedtrain.data.readers import Rows
from embedtrain.data.token_hash import hashed_rows
from embedtrain.data.vocabulary import WordRows


def encode_rows(
    rows: Rows, schema: ClickSchema, vocabularies: Mapping[str, WordRows], where: str
) -> tuple[Records, dict[int, str]]:
    """Returns the records of the usable rows, and the reasons for bad rows by line.

    Args:
        rows: some rows of a file or a stream.
        schema: the meaning of their columns.
        vocabularies: vocabularies of the columns that have one.
        where: the source of the rows, for messages.

    Raises:
        UserError: a column of a Parquet file has a type that does not fit the schema.
    """
    examples, wrong = parse_rows(rows, schema, where)
    dtype = record_dtype(len(schema.dense), len(schema.single), len(schema.bags), is_wide=True)
    return Records(*encode(examples, schema, vocabularies, dtype, 0)), wrong


def encode(
    examples: Examples,
    schema: ClickSchema,
    vocabularies: Mapping[str, WordRows],
    dtype: np.dtype[Any],
    num_values_before: int,
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns the records of the examples and the rows of their bags."""
    records = np.zeros(len(examples), dtype)
    records[LABEL] = examples.labels
    records[DENSE] = _transform_dense(examples.dense, schema)
    rows = {
        column.name: _rows_of(examples.categorical[column.name].values, column, vocabularies)
        for column in schema.categorical
    }
    for place, column in enumerate(schema.single):
        records[IDS][:, place] = rows[column.name]
    row_type = dtype[IDS].base
    if not schema.bags:
        return records, np.zeros(0, row_type)
    lengths = np.stack([_lengths(examples, column.name) for column in schema.bags], axis=1)
    records[BAG_LENGTHS] = lengths
    ends = num_values_before + lengths.sum(axis=1).cumsum()
    records[FIRST_VALUE] = ends - lengths.sum(axis=1)
    # A stable sort by example puts the bags' values, given column by column, in the order of a record's bags.
    owners = np.concatenate([np.repeat(np.arange(len(examples)), lengths[:, b]) for b in range(len(schema.bags))])
    values = np.concatenate([rows[column.name] for column in schema.bags])
    return records, values[np.argsort(owners, kind="stable")].astype(row_type)


def _lengths(examples: Examples, name: str) -> NDArray[np.int64]:
    lengths = examples.categorical[name].lengths
    assert lengths is not None
    return lengths


def _rows_of(values: pa.Array, column: CategoricalColumn, vocabularies: Mapping[str, WordRows]) -> NDArray[np.int64]:
    if column.encoding == "id":
        return np.asarray(values.to_numpy(zero_copy_only=False))
    if column.encoding == "hash":
        assert column.num_rows is not None
        return hashed_rows(values, column.num_rows)
    # Row 0 stands for all values out of the vocabulary.
    return vocabularies[column.name].of(values.cast(pa.large_binary())).astype(np.int64) + 1


def _transform_dense(dense: NDArray[np.float32], schema: ClickSchema) -> NDArray[np.float32]:
    """Applies the schema's `dense_transform` to the numbers."""
    if schema.dense_transform == "none":
        return dense
    transformed: NDArray[np.float32] = np.copysign(np.log1p(np.abs(dense)), dense)
    return transformed


class Moments:
    """Computes counts, means and sums of squared deviations of columns, ignoring missing numbers.

    Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """

    def __init__(self, num_columns: int) -> None:
        self.count = np.zeros(num_columns)
        self.mean = np.zeros(num_columns)
        self.deviation = np.zeros(num_columns)

    def add(self, numbers: NDArray[np.float32]) -> None:
        """Adds numbers [n, num_columns]."""
        wide = numbers.astype(np.float64)
        count = (~np.isnan(wide)).sum(axis=0).astype(np.float64)
        mean = np.nansum(wide, axis=0) / np.maximum(count, 1)
        self.merge(count, mean, np.nansum((wide - mean) ** 2, axis=0))

    def merge(self, count: NDArray[np.float64], mean: NDArray[np.float64], deviation: NDArray[np.float64]) -> None:
        """Adds the moments of other numbers."""
        total = self.count + count
        share = count / np.maximum(total, 1)
        difference = mean - self.mean
        self.mean = self.mean + difference * share
        self.deviation = self.deviation + deviation + difference**2 * self.count * share
        self.count = total

    @property
    def std(self) -> NDArray[np.float64]:
        """The standard deviations; 1 if a column does not vary."""
        std = np.sqrt(self.deviation / np.maximum(self.count, 1))
        return np.where(std > 0, std, 1.0)

    def as_json(self) -> list[list[float]]:
        """Returns count, mean and sum of squared deviations."""
        return [self.count.tolist(), self.mean.tolist(), self.deviation.tolist()]
