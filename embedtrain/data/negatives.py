"""The distribution of negatives: by a power of a word's frequency, in constant time per draw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from embedtrain.sharding.layout import layout_of

NUM_COMMON_WORDS = 1000
"""Number of words that every part contains, the most frequent ones. They are few rows and half of all draws. If they
were in one part only, they would be far too frequent in its blocks and absent from the other blocks."""
MIN_WORDS_OF_PART = 2000
"""Smallest mean number of other words per part; fewer would be a poor picture of the language."""


@dataclass(frozen=True)
class VocabularyPart:
    """Holds the words from which a block of text draws its negatives.

    Attributes:
        rows: [n] int64; rows of the words.
        weights: [n]; the probability of each word, up to a common factor.
    """

    rows: NDArray[np.int64]
    weights: NDArray[np.float64]


def num_parts_of(num_rows: int, num_parts: int) -> int:
    """Halves `num_parts` until parts have `MIN_WORDS_OF_PART` other words on average, and returns it."""
    while num_parts > 1 and num_rows - NUM_COMMON_WORDS < num_parts * MIN_WORDS_OF_PART:
        num_parts //= 2
    return num_parts


def part_vocabulary(weights: NDArray[np.float64], num_parts: int) -> list[VocabularyPart]:
    """Cuts a vocabulary into parts: runs of neighbouring slots with equal total weight.

    A rank owns a range of slots with an equal number of rows, and the layout spreads words of any frequency evenly over
    the slots. So with N ranks and N parts, each rank owns nearly all words of one part. The most frequent words are in
    every part. Each other word is in one part, with its weight multiplied by the number of parts. So over all parts,
    each word is drawn in proportion to its weight.

    Args:
        weights: [num_rows]; the probability of each row, up to a common factor, in descending order.
        num_parts: largest number of parts; see `num_parts_of`.
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
    """Splits a distribution into columns of equal mass, each shared by at most two rows.

    Args:
        weights: [num_rows]; not negative and not all zero. Their sum need not be 1.

    Returns:
        own: [num_rows]; the share of column i that belongs to row i.
        other: [num_rows] int64; the row that the rest of column i belongs to.

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
