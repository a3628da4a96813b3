"""A prepared click log: its examples as records in memory-mapped files."""

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
    """Returns the NumPy dtype of an example's record.

    Args:
        num_dense: number of float32 numbers, transformed but not normalised; NaN if missing.
        num_single: number of single-valued categorical columns, whose rows the record holds.
        num_bags: number of bags, whose lengths the record holds; their rows are in another file, from `first_value` on.
        is_wide: whether rows need 64 bits.
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
    """Returns the dtype of a stored row number."""
    return np.dtype("<i8" if is_wide else "<i4")


@dataclass(frozen=True)
class Records:
    """Holds some examples of a log.

    Attributes:
        examples: [n] of `record_dtype`.
        values: [num_values] rows of all bags, ordered by example, then by bag.
    """

    examples: NDArray[Any]
    values: NDArray[Any]


class ClickLayout:
    """Describes the fields of the records.

    Attributes:
        num_rows: number of rows of each categorical column's table.
        dense_mean: [num_dense] float64; subtracted from a number.
        dense_std: [num_dense] float64; the difference is divided by it.
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
        """The categorical columns, single-valued ones first."""
        return [*self.single_names, *self.bag_names]

    def vocabulary(self, name: str) -> pa.Table | None:
        """Returns the vocabulary of a column with counts, in row order from row 1.

        None if the column has no vocabulary, or uses the vocabulary of other records.
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
    """The table of contents that `prepare_clicks` writes."""

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
    """Opens the examples of a prepared click log, in the order of the log.

    Args:
        path: local folder that `prepare_clicks` wrote.
        unverified: see `prepared_entry`.

    Attributes:
        fingerprint: hash of the examples and of the meaning of their rows.
        num_examples: number of usable lines.
        num_positives: number of examples with label 1.
        num_faults: number of bad lines.
        source_identities: identities of the source files; see `Source.identity`.

    Raises:
        ValueError: the table of contents is invalid.
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
        # The mean of the present numbers; the deviation is 1 if a column does not vary.
        self.dense_mean = np.array(meta.dense_mean)
        self.dense_std = np.array(meta.dense_std)
        self.single_names = meta.single
        self.bag_names = meta.bags
        self._is_wide = meta.is_wide
        # Empty files cannot be memory-mapped.
        self._parts = [shard for shard in meta.shards if shard.num_examples]
        self._starts = np.cumsum([0, *(shard.num_examples for shard in self._parts)])
        self.num_examples = int(self._starts[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of a record."""
        return record_dtype(len(self.dense_names), len(self.single_names), len(self.bag_names), self._is_wide)

    def read(self, start: int, stop: int) -> Records:
        """Returns a copy of examples [start, stop).

        Raises:
            ValueError: the range is not inside [0, num_examples].
        """
        if not 0 <= start <= stop <= self.num_examples:
            raise ValueError(f"the range must be inside [0, {self.num_examples}], got [{start}, {stop})")
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
        """Mean number of values per bag over all columns of bags; 0 if there are none."""
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
