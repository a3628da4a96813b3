"""A click log that was prepared for training: its examples as records in memory-mapped files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedtrain.data.prepared import map_values, read_contents
from embedtrain.data.seal import FileName, Unverified
from embedtrain.schema import Count, Number, Positive

LABEL, DENSE, IDS, BAG_LENGTHS, FIRST_VALUE = "label", "dense", "ids", "bag_lengths", "first_value"
"""The fields of a record."""


def record_dtype(num_dense: int, num_single: int, num_bags: int, is_wide: bool) -> np.dtype[Any]:
    """Returns the layout of an example.

    Args:
        num_dense: numbers, float32, transformed but not yet normalised; NaN where one is missing.
        num_single: rows of the categorical columns of one value each.
        num_bags: lengths of the bags, whose rows lie in another file, from the record's `first_value` on.
        is_wide: whether rows take 64 bits.
    """
    fields: list[Any] = [
        (FIRST_VALUE, "<i8"),
        (LABEL, "<f4"),
        (DENSE, "<f4", (num_dense,)),
        (IDS, row_dtype(is_wide), (num_single,)),
        (BAG_LENGTHS, "<i4", (num_bags,)),
    ]
    return np.dtype(fields)


def row_dtype(is_wide: bool) -> np.dtype[Any]:
    """Returns the type of a stored row of a table."""
    return np.dtype("<i8" if is_wide else "<i4")


@dataclass(frozen=True)
class Records:
    """Some examples of a log.

    Attributes:
        examples: [n] of `record_dtype`.
        values: [num_values] rows of all their bags: example by example, bag by bag.
    """

    examples: NDArray[Any]
    values: NDArray[Any]


class ClickLayout:
    """What the fields of records mean.

    Attributes:
        num_rows: rows of each categorical column's table.
        dense_mean: [num_dense] float64; what is taken from a number.
        dense_std: [num_dense] float64; what it is then divided by.
        dense_names: the dense columns, in the order of a record's numbers.
        single_names: the categorical columns of one value, in the order of a record's rows.
        bag_names: the categorical columns that are bags, in the order of a record's lengths.
        vocabulary_fingerprint: a hash of the vocabularies.
    """

    num_rows: Mapping[str, int]
    dense_mean: NDArray[np.float64]
    dense_std: NDArray[np.float64]
    dense_names: Sequence[str]
    single_names: Sequence[str]
    bag_names: Sequence[str]
    vocabulary_fingerprint: str

    @property
    def feature_names(self) -> list[str]:
        """The categorical columns, single ones first."""
        return [*self.single_names, *self.bag_names]

    def vocabulary(self, name: str) -> pa.Table | None:
        """Returns the values of a column that have a row of their own, by row from 1 on, with their counts.

        None where the column has no vocabulary, or took that of other records.
        """
        return None


@dataclass(frozen=True)
class _Shard:
    examples: FileName
    values: FileName
    num_examples: Count
    num_positives: Count
    num_values: Count


@dataclass(frozen=True)
class _Meta:
    """What `prepare_clicks` says of an entry in its table of contents."""

    fingerprint: str
    vocabulary_fingerprint: str
    sources: list[str]
    num_faults: Count
    num_rows: dict[str, Positive]
    dense: list[str]
    dense_mean: list[Number]
    dense_std: list[Number]
    single: list[str]
    bags: list[str]
    is_wide: bool
    shards: tuple[_Shard, ...]


class ClickLog(ClickLayout):
    """The examples of a click log, in its order; opened from the folder that `prepare_clicks` made.

    Args:
        path: the folder, on a local file system.
        unverified: see `prepared_entry`.

    Attributes:
        fingerprint: a hash of the examples and of what their rows mean.
        num_examples: lines that could be used.
        num_positives: of them, those of label 1.
        num_faults: lines that could not be used.
        source_identities: of the files it was made from; see `Source.identity`.

    Raises:
        ValueError: the table of contents is not one.
        RuntimeError: a file does not have the size that it was written with.
    """

    def __init__(self, path: str, unverified: Unverified = ()) -> None:
        self.path = path
        self.unverified = unverified
        meta = read_contents(path, _Meta)
        self.fingerprint = meta.fingerprint
        self.vocabulary_fingerprint = meta.vocabulary_fingerprint
        self.source_identities = meta.sources
        self.num_faults = meta.num_faults
        self.num_positives = sum(shard.num_positives for shard in meta.shards)
        self.num_rows = meta.num_rows
        self.dense_names = meta.dense
        # The mean of what is not missing; the deviation is 1 where a column does not vary.
        self.dense_mean = np.array(meta.dense_mean)
        self.dense_std = np.array(meta.dense_std)
        self.single_names = meta.single
        self.bag_names = meta.bags
        self._is_wide = meta.is_wide
        # Files of no bytes cannot be mapped, and hold nothing to read.
        self._parts = [shard for shard in meta.shards if shard.num_examples]
        self._starts = np.cumsum([0, *(shard.num_examples for shard in self._parts)])
        self.num_examples = int(self._starts[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The layout of a record."""
        return record_dtype(len(self.dense_names), len(self.single_names), len(self.bag_names), self._is_wide)

    def read(self, start: int, stop: int) -> Records:
        """Returns a copy of examples [start, stop).

        Raises:
            ValueError: the range is not inside [0, num_examples].
        """
        if not 0 <= start <= stop <= self.num_examples:
            raise ValueError(f"expected a range inside [0, {self.num_examples}], got [{start}, {stop})")
        examples, values = [np.zeros(0, self.dtype)], [np.zeros(0, row_dtype(self._is_wide))]
        part = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            first = start - int(self._starts[part])
            piece = self._examples[part][first : first + stop - start]
            examples.append(piece)
            if self.bag_names:
                begin = int(piece[FIRST_VALUE][0])
                end = int(piece[FIRST_VALUE][-1]) + int(piece[BAG_LENGTHS][-1].sum())
                values.append(self._values[part][begin:end])
            start += len(piece)
            part += 1
        return Records(np.concatenate(examples), np.concatenate(values))

    @property
    def mean_bag_length(self) -> float:
        """Values of a bag on average, over all columns that are bags; 0 where there are none."""
        num_bags = self.num_examples * len(self.bag_names)
        return sum(part.num_values for part in self._parts) / num_bags if num_bags else 0.0

    def vocabulary(self, name: str) -> pa.Table | None:
        """See `ClickLayout.vocabulary`."""
        path = os.path.join(self.path, vocabulary_name(self.feature_names.index(name)))
        if not os.path.exists(path):
            return None
        with pa.memory_map(path) as file:
            return pa.ipc.open_file(file).read_all()

    def __reduce__(self) -> tuple[type[ClickLog], tuple[str]]:
        return type(self), (self.path,)

    @cached_property
    def _examples(self) -> list[NDArray[Any]]:
        return [self._map(part.examples, self.dtype, part.num_examples) for part in self._parts]

    @cached_property
    def _values(self) -> list[NDArray[Any]]:
        return [self._map(part.values, row_dtype(self._is_wide), part.num_values) for part in self._parts]

    def _map(self, name: str, dtype: np.dtype[Any], num: int) -> NDArray[Any]:
        return map_values(os.path.join(self.path, name), dtype, num)


def vocabulary_name(number: int) -> str:
    """Returns the file name of the vocabulary of the categorical column at a place among a log's."""
    return f"vocabulary-{number:03d}.arrow"
