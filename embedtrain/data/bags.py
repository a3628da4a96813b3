"""Lists of rows for each of many rows, on disk and mapped into memory: the items of each user, and the like."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Bags:
    """One bag of values for each row.

    Attributes:
        starts: [num_rows + 1] int64; where each row's values begin, and the last ones end.
        values: [starts[-1]] int64.
    """

    starts: NDArray[np.int64]
    values: NDArray[np.int64]

    @classmethod
    def from_rows(cls, rows: NDArray[np.int64], values: NDArray[np.int64], num_rows: int) -> Bags:
        """Makes bags of values [n] whose rows [n] are ascending."""
        lengths = np.bincount(rows, minlength=num_rows)
        return cls(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), values.astype(np.int64))

    @classmethod
    def load(cls, path: str) -> Bags:
        """Maps what `save` wrote."""
        # Indexing a plain array takes a tenth of the time that `np.memmap` takes.
        starts, values = (
            np.load(f"{path}.{name}.npy", mmap_mode="r").view(np.ndarray) for name in ("starts", "values")
        )
        return cls(starts, values)

    def save(self, path: str) -> None:
        """Writes two files whose names begin with `path`."""
        np.save(f"{path}.starts.npy", self.starts)
        np.save(f"{path}.values.npy", self.values)

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def fingerprint(self) -> str:
        """A hash of the bags."""
        return xxhash.xxh3_128_hexdigest(self.starts.tobytes() + self.values.tobytes())

    def rows(self) -> NDArray[np.int64]:
        """Returns the row of each value."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the number of values of each of [n] rows."""
        lengths: NDArray[np.int64] = self.starts[rows + 1] - self.starts[rows]
        return lengths

    def of(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the values of [n] rows one after the other, and the lengths [n] of their bags."""
        lengths = self.lengths(rows)
        return self.values[spans(self.starts[rows], lengths)], lengths


def spans(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the positions of runs one after the other: `starts[0], starts[0] + 1, ...`, `lengths[0]` of them, ..."""
    before = np.cumsum(lengths) - lengths
    positions: NDArray[np.int64] = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return positions


def distinct(*columns: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Returns the different rows of columns [n], ascending by the first column, then by the second and so on."""
    order = np.lexsort(columns[::-1])
    ordered = [column[order] for column in columns]
    is_first = np.ones(len(order), bool)
    is_first[1:] = np.any([column[1:] != column[:-1] for column in ordered], axis=0)
    return [column[is_first] for column in ordered]


def union(first: Bags, second: Bags) -> Bags:
    """Returns the values of two lists of bags, each row's ascending and once; -1 is left out."""
    rows = np.concatenate([first.rows(), second.rows()])
    values = np.concatenate([first.values, second.values])
    found_rows, found = distinct(rows[values >= 0], values[values >= 0])
    return Bags.from_rows(found_rows, found, len(first))


def without(bags: Bags, others: Bags) -> Bags:
    """Returns the values of bags that the same row of other bags does not have; -1 stays."""
    width = 1 + max(bags.values.max(initial=0), others.values.max(initial=0))
    # The key of -1 would be the key of the largest value in the row before.
    is_value, is_other = bags.values >= 0, others.values >= 0
    keys, other_keys = bags.rows() * width + bags.values, (others.rows() * width + others.values)[is_other]
    is_left = ~(is_value & np.isin(keys, other_keys))
    return Bags.from_rows(bags.rows()[is_left], bags.values[is_left], len(bags))
