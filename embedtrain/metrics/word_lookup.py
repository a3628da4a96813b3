"""Looks up the rows of words for evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embedtrain.errors import UserError


def require_vocab(restrict_vocab: int) -> None:
    """Raises UserError if the number of words to which an evaluation is restricted is below 1."""
    if restrict_vocab < 1:
        raise UserError(f"restrict_vocab must be at least 1, got {restrict_vocab}")


class WordLookup:
    """Maps words to rows. If case is ignored, words that differ only in case share the row of the first.

    Attributes:
        first_rows: [n] int64; the row to which the word of each row is mapped.
    """

    def __init__(self, words: Sequence[str], case_insensitive: bool) -> None:
        self._case_insensitive = case_insensitive
        self._rows: dict[str, int] = {}
        first_rows = [self._rows.setdefault(self._key(word), row) for row, word in enumerate(words)]
        self.first_rows = np.array(first_rows, dtype=np.int64)

    def row_of(self, word: str) -> int | None:
        """Returns the row of `word`; None if it is not in the vocabulary."""
        return self._rows.get(self._key(word))

    def _key(self, word: str) -> str:
        # `upper` as in gensim, because `casefold` treats a few letters differently.
        return word.upper() if self._case_insensitive else word
