"""Words to rows, as evaluations look them up."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedtrain.errors import UserError


def require_vocab(restrict_vocab: int) -> None:
    """Raises UserError when an evaluation is restricted to no words, or to a negative number of them."""
    if restrict_vocab < 1:
        raise UserError(f"restrict_vocab must be at least 1, got {restrict_vocab}")


class WordLookup:
    """The row of each word. Without case, the first of the words that differ in case alone stands for all.

    Attributes:
        first_rows: [n] int64, the row that stands for each row's word.
    """

    def __init__(self, words: Sequence[str], case_insensitive: bool) -> None:
        self._case_insensitive = case_insensitive
        self._rows: dict[str, int] = {}
        first_rows = [self._rows.setdefault(self._key(word), row) for row, word in enumerate(words)]
        self.first_rows = np.array(first_rows, dtype=np.int64)

    def row_of(self, word: str) -> int | None:
        """Returns the row of `word`, or None where it is not in the vocabulary."""
        return self._rows.get(self._key(word))

    def _key(self, word: str) -> str:
        # Upper case as in gensim, not casefold: the two fold a few letters differently.
        return word.upper() if self._case_insensitive else word
