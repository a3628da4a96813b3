"""Nearest neighbours by cosine of a word or a sum of words, streamed over the table."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from embedtrain.errors import UserError
from embedtrain.export.index import Index
from embedtrain.export.vectors import FloatRows, Vectors, unit_rows

_SIGNS = {"+": 1, "-": -1}


def neighbors(vectors: Vectors, query: str, top: int = 10, index: Index | None = None) -> list[tuple[str, float]]:
    """Returns the words nearest to the query with their cosines, nearest first, without the query's own words.

    Args:
        vectors: the table.
        query: a word (`king`), or words joined by signs (`king - man + woman`). Vectors are scaled to length 1
            before they are added or subtracted.
        top: number of words.
        index: a cosine index of these vectors, which is faster but may miss neighbours; None to read all rows.

    Raises:
        UserError: a word is unknown, the query is malformed, or its vectors add up to zero.
    """
    if top < 1:
        raise UserError(f"the number of neighbours must be at least 1, got {top}")
    terms = [(sign, vectors.row_of(word)) for sign, word in _parse(query, vectors)]
    target = np.sum([sign * unit_rows(vectors.rows(row, row + 1))[0] for sign, row in terms], axis=0)
    length = np.linalg.norm(target)
    if length < 1e-6:
        raise UserError(f"the vectors of the query {query!r} add up to zero, which has no neighbours")
    excluded = [row for _, row in terms]
    if index is None:
        rows, cosines = _nearest(vectors, target / length, excluded, top)
    else:
        rows, cosines = index.best(vectors, (target / length).astype(np.float32), top + len(excluded))
        is_wanted = ~np.isin(rows, excluded)
        rows, cosines = rows[is_wanted][:top], cosines[is_wanted][:top]
    return [(vectors.words[row], float(cosine)) for row, cosine in zip(rows.tolist(), cosines, strict=True)]


def _nearest(
    vectors: Vectors, target: FloatRows, excluded: list[int], top: int
) -> tuple[npt.NDArray[np.int64], FloatRows]:
    """Returns the `top` rows nearest to `target` [dim] and their cosines; ties are ordered by row."""
    best_rows, best_cosines = np.empty(0, np.int64), np.empty(0, np.float32)
    for start, block in vectors.blocks():
        rows = np.arange(start, start + len(block))
        allowed = ~np.isin(rows, excluded)
        rows = np.concatenate([best_rows, rows[allowed]])
        cosines = np.concatenate([best_cosines, (unit_rows(block) @ target)[allowed]])
        order = np.argsort(-cosines, kind="stable")[:top]
        best_rows, best_cosines = rows[order], cosines[order]
    return best_rows, best_cosines


def _parse(query: str, vectors: Vectors) -> list[tuple[int, str]]:
    """Returns the words of a query with their signs."""
    tokens = query.split()
    if query in vectors.words:  # A word may contain a space or be a sign.
        return [(1, query)]
    if len(tokens) < 2:
        return [(1, query.strip())]
    if tokens[0] not in _SIGNS:
        tokens.insert(0, "+")
    signs, words = tokens[0::2], tokens[1::2]
    if len(signs) != len(words) or not set(signs) <= _SIGNS.keys():
        if vectors.find is not None:  # Hashed tables have a row for any text.
            return [(1, query)]
        raise UserError(
            f"cannot parse the query {query!r}: expected a word, or words joined by + or - with spaces "
            f"around it, such as 'king - man + woman'"
        )
    return [(_SIGNS[sign], word) for sign, word in zip(signs, words, strict=True)]
