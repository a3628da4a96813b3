"""Correlation of word vectors with human scores of word similarity, computed as in gensim 4.4."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedtrain.errors import UserError
from embedtrain.metrics.word_lookup import WordLookup, require_vocab


@dataclass(frozen=True)
class SimilarityReport:
    """Holds the result of `evaluate_similarity`.

    Attributes:
        spearman: rank correlation of the cosines with the human scores.
        pearson: linear correlation of the cosines with the human scores.
        num_pairs: number of pairs with both words in the vocabulary; the correlations use only these.
        oov_ratio: share of all pairs with a word out of the vocabulary, 0 to 1.
    """

    spearman: float
    pearson: float
    num_pairs: int
    oov_ratio: float


def evaluate_similarity(
    unit_vectors: npt.NDArray[np.float32],
    words: Sequence[str],
    lines: Iterable[str],
    restrict_vocab: int = 300_000,
    case_insensitive: bool = True,
    source: str = "word pairs",
) -> SimilarityReport:
    """Correlates the cosines of word pairs with human scores.

    Args:
        unit_vectors: [n, dim] vectors of length 1, the most frequent word first.
        words: [n] words.
        lines: lines of two words and a score, as `read_pairs` reads them.
        restrict_vocab: number of words, from the first, that are looked up.
        case_insensitive: whether words are compared in upper case.
        source: name of the file of pairs in messages.

    Raises:
        UserError: a line cannot be read, fewer than two pairs are in the vocabulary, all of them have the same score,
            or `restrict_vocab` is below 1. For a line the message names file and line.

    Source: `gensim.models.KeyedVectors.evaluate_word_pairs` with dummy4unknown=False.
    """
    require_vocab(restrict_vocab)
    lookup = WordLookup(words[:restrict_vocab], case_insensitive)
    pairs: list[tuple[int, int]] = []
    scores: list[float] = []
    num_oov = 0
    for first, second, score in read_pairs(lines, source):
        first_row, second_row = lookup.row_of(first), lookup.row_of(second)
        if first_row is None or second_row is None:
            num_oov += 1
        else:
            pairs.append((first_row, second_row))
            scores.append(score)
    if len(pairs) < 2:
        raise UserError(
            f"{source}: expected at least two pairs of known words, found {len(pairs)} "
            f"and {num_oov} with a word that is not in the vocabulary"
        )
    _require_different(scores, f"{source}: all pairs of known words")
    left, right = np.array(pairs).T
    cosines = np.einsum("nd,nd->n", unit_vectors[left], unit_vectors[right])
    from scipy import stats  # the import takes 1.5 seconds, and few commands need it

    return SimilarityReport(
        spearman=float(stats.spearmanr(scores, cosines).statistic),
        pearson=float(stats.pearsonr(scores, cosines).statistic),
        num_pairs=len(pairs),
        oov_ratio=num_oov / (len(pairs) + num_oov),
    )


def check_pairs(lines: Iterable[str], source: str) -> None:
    """Refuses lines that `evaluate_similarity` cannot use with any vocabulary.

    Raises:
        UserError: a line cannot be read, there are fewer than two pairs, or all pairs have the same score.
    """
    scores = [score for _, _, score in read_pairs(lines, source)]
    if len(scores) < 2:
        raise UserError(f"{source}: expected at least two lines of two words and a score, found {len(scores)}")
    _require_different(scores, f"{source}: all pairs")


def read_pairs(lines: Iterable[str], source: str) -> Iterator[tuple[str, str, float]]:
    """Yields the two words and the human score of each line of text, TSV or CSV.

    Lines that begin with `#` are comments. A first line without a number is a header. The scores are the first numeric
    column after the two words: SimLex-999 has the part of speech before it, other files have more columns after it.

    Raises:
        UserError: a line cannot be read; the message names file and line.
    """
    shape: _Columns | None = None
    may_be_header = True
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix("\ufeff")
        if line.startswith("#") or not line.strip():
            continue
        delimiter = _delimiter_of(line) if shape is None else shape.delimiter
        fields = _fields(line, delimiter)
        found = _columns_of(fields, delimiter) if shape is None else shape
        if found is None and may_be_header and len(fields) > 2 and not any(map(_is_number, fields)):
            may_be_header = False
            continue
        score = math.nan
        if found is not None and len(fields) == found.num_fields and all(fields[:2]):
            shape = found
            score = float(fields[shape.score]) if _is_number(fields[shape.score]) else math.nan
        if not math.isfinite(score):
            raise UserError(
                f"{source}, line {number}: expected two words and a score, separated by {_NAMES[delimiter]}, got "
                f"{line.rstrip()!r}; a comment begins with #"
            )
        yield fields[0], fields[1], score


def _require_different(scores: Sequence[float], which: str) -> None:
    if len(set(scores)) == 1:
        raise UserError(f"{which} have the score {scores[0]:g}, so nothing can be compared")


_NAMES = {"\t": "tabs", ",": "commas", None: "spaces"}


@dataclass(frozen=True)
class _Columns:
    """Holds the format of a file's lines: the delimiter, the number of fields, and the index of the score."""

    delimiter: str | None
    num_fields: int
    score: int


def _delimiter_of(line: str) -> str | None:
    if "\t" in line:
        return "\t"
    return "," if len(_fields(line, ",")) > 2 else None


def _fields(line: str, delimiter: str | None) -> list[str]:
    if delimiter != ",":
        return [field.strip() for field in line.split(delimiter)]
    return [field.strip() for field in next(csv.reader([line.strip()], skipinitialspace=True), [])]


def _columns_of(fields: Sequence[str], delimiter: str | None) -> _Columns | None:
    """Returns the format of a line of two words and a score; None if the line has no score."""
    score = next((place for place, field in enumerate(fields) if place > 1 and _is_number(field)), None)
    if score is None or (delimiter is None and len(fields) != 3):  # a word with a space makes two fields
        return None
    return _Columns(delimiter, len(fields), score)


def _is_number(text: str) -> bool:
    """Returns whether a text is a number, which may be infinite or NaN: a line with one is no header."""
    try:
        float(text)
    except ValueError:
        return False
    return True
