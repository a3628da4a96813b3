"""Negative words, drawn by a power of their frequency."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class NegativeSampler:
    """Draws rows with probability proportional to `count ** power`, in constant time a draw.

    Args:
        counts: [num_rows] occurrences of each row.
        power: 0.75 in word2vec; 0 is uniform.

    Source: Walker's alias method, as built by Vose 1991.
    """

    def __init__(self, counts: NDArray[np.int64], power: float = 0.75) -> None:
        if len(counts) == 0:
            raise ValueError("negatives need at least one row to draw from")
        weights = counts.astype(np.float64) ** power
        self._keep, self._alias = _alias_table(weights * (len(weights) / weights.sum()))

    def draw(self, generator: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.int64]:
        """Returns rows of the given shape."""
        # One draw serves both choices: its whole part picks a column, the rest one of the column's two rows.
        draws = generator.random(shape) * len(self._keep)
        columns = draws.astype(np.int64)
        return np.where(draws - columns < self._keep[columns], columns, self._alias[columns])


def _alias_table(shares: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Splits shares, of mean 1, into columns of two rows: the probability of the column's own, and the other."""
    keep = shares.tolist()
    alias = list(range(len(keep)))
    small = [row for row, share in enumerate(keep) if share < 1.0]
    large = [row for row, share in enumerate(keep) if share >= 1.0]
    while small and large:
        lesser, greater = small.pop(), large[-1]
        alias[lesser] = greater
        keep[greater] -= 1.0 - keep[lesser]
        if keep[greater] < 1.0:
            small.append(large.pop())
    for row in small + large:  # what rounding left over
        keep[row] = 1.0
    return np.array(keep), np.array(alias, dtype=np.int64)
