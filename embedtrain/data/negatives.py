"""The distribution of negative words: by a power of their frequency, in constant time a draw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def alias_table(weights: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Splits a distribution into columns of equal mass, each shared by two rows at most.

    Args:
        weights: [num_rows] not negative, and not all zero; need not add up to 1.

    Returns:
        own: [num_rows]; the share of column i that is row i's.
        other: [num_rows] int64; whose the rest of it is.

    Source: Walker's alias method, as built by Vose 1991, "A linear algorithm for generating random numbers with a
    given distribution".
    """
    own = (weights * (len(weights) / weights.sum())).tolist()
    other = list(range(len(own)))
    small = [row for row, share in enumerate(own) if share < 1.0]
    large = [row for row, share in enumerate(own) if share >= 1.0]
    while small and large:
        lesser, greater = small.pop(), large[-1]
        other[lesser] = greater
        own[greater] -= 1.0 - own[lesser]
        if own[greater] < 1.0:
            small.append(large.pop())
    for row in small + large:  # what rounding left over
        own[row] = 1.0
    return np.array(own), np.array(other, dtype=np.int64)
