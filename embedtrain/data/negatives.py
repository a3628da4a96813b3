"""The distribution of negative words: by a power of their frequency, in constant time a draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from embedtrain.sharding.layout import layout_of

NUM_COMMON_WORDS = 1000
"""The words drawn most, which every part has: few rows, and half of all draws. Apart, they would be far too frequent in
one part's blocks and absent from the others'."""
MIN_WORDS_OF_PART = 2000
"""Smallest number of other words in a part; fewer would be a poor picture of the language."""


@dataclass(frozen=True)
class VocabularyPart:
    """Words from which a block of text draws its negatives.

    Attributes:
        rows: [n] int64.
        weights: [n]; how often each is to be drawn, up to a factor.
    """

    rows: NDArray[np.int64]
    weights: NDArray[np.float64]


def num_parts_of(num_rows: int, num_parts: int) -> int:
    """Returns how many parts a vocabulary is large enough for: `num_parts`, or half as many, or a quarter, ..."""
    while num_parts > 1 and num_rows - NUM_COMMON_WORDS < num_parts * MIN_WORDS_OF_PART:
        num_parts //= 2
    return num_parts


def part_vocabulary(weights: NDArray[np.float64], num_parts: int) -> list[VocabularyPart]:
    """Parts a vocabulary into runs of neighbouring slots of equal weight, which a rank owns as a whole where it can.

    Ranks own ranges of slots, and the layout spreads words of any frequency evenly over them: so N ranks own the parts
    of their N shares but for the few words by which equal weights and equal counts differ. The most frequent words are
    in all parts, the others in one, where they weigh as many times more: over all parts each is drawn by its weight.

    Args:
        weights: [num_rows]; how often each row is to be drawn, falling.
        num_parts: so many at most; see `num_parts_of`.
    """
    num_rows = len(weights)
    num_parts = num_parts_of(num_rows, num_parts)
    if num_parts == 1:
        return [VocabularyPart(np.arange(num_rows), weights)]
    in_slots = layout_of(num_rows).id_of(torch.arange(num_rows)).numpy()
    rows, common = in_slots[in_slots >= NUM_COMMON_WORDS], np.arange(NUM_COMMON_WORDS)
    middles = weights[rows].cumsum() - weights[rows] / 2
    bounds = weights[rows].sum() * np.arange(1, num_parts) / num_parts
    parts: list[NDArray[np.int64]] = np.split(rows, np.searchsorted(middles, bounds))
    return [
        VocabularyPart(np.concatenate([common, part]), np.concatenate([weights[common], weights[part] * num_parts]))
        for part in parts
    ]


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


def draw_rows(
    generator: np.random.Generator, number: int, table: tuple[NDArray[np.float64], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Draws rows from an `alias_table`, with replacement.

    Returns:
        [number] int64.
    """
    own, other = table
    places = generator.random(number) * len(own)
    columns = places.astype(np.int64)
    drawn: NDArray[np.int64] = np.where(places - columns < own[columns], columns, other[columns])
    return drawn
