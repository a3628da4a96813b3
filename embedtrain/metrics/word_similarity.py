"""Agreement with people's judgements of how similar two words are, counted as gensim 4.4 counts it."""

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
    """What `evaluate_similarity` found.

    Attributes:
        spearman: rank correlation of the cosines with the judgements.
        pearson: linear correlation of the same.
        num_pairs: pairs whose two words are in the vocabulary; only they count.
        oov_ratio: share of all pairs that are left out, 0 to 1.
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
    """Correlates the cosines of word pairs with people's scores.

    Args:
        unit_vectors: [n, dim] vectors of length 1, the most frequent word first.
        words: [n] words.
        lines: of two words and a score, as `read_pairs` reads them.
        restrict_vocab: only the first so many words are looked up.
        case_insensitive: whether words are compared in upper case.
        source: name of the pairs' file in messages.

    Raises:
        UserError: a line cannot be read (names file and line), or fewer than two pairs are in the vocabulary.
            Or `restrict_vocab` is below 1.

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
    left, right = np.array(pairs).T
    cosines = np.einsum("nd,nd->n", unit_vectors[left], unit_vectors[right])
    from scipy import stats  # takes a second and a half, and few commands want it

    return SimilarityReport(
        spearman=float(stats.spearmanr(scores, cosines).statistic),
        pearson=float(stats.pearsonr(scores, cosines).statistic),
        num_pairs=len(pairs),
        oov_ratio=num_oov / (len(pairs) + num_oov),
    )


def check_pairs(lines: Iterable[str], source: str) -> None:
    """Refuses lines that `evaluate_similarity` cannot use, whatever the vocabulary.

    Raises:
        UserError: a line cannot be read, or there are fewer than two pairs.
    """
    num_pairs = sum(1 for _ in read_pairs(lines, source))
    if num_pairs < 2:
        raise UserError(f"{source}: expected at least two lines of two words and a score, found {num_pairs}")


def read_pairs(lines: Iterable[str], source: str) -> Iterator[tuple[str, str, float]]:
    """Yields two words and people's score of each line, from what is published as text, TSV or CSV.

    Lines that begin with `#` are comments. A first line without a score names the columns. The first column of numbers
    after two words holds the scores: SimLex-999 has the part of speech before it, other files further columns after it.

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
            score = _number(fields[shape.score])
        if not math.isfinite(score):
            raise UserError(
                f"{source}, line {number}: expected two words and a score, separated by {_NAMES[delimiter]}, got "
                f"{line.rstrip()!r}; a comment begins with #"
            )
        yield fields[0], fields[1], score


_NAMES = {"\t": "tabs", ",": "commas", None: "spaces"}


@dataclass(frozen=True)
class _Columns:
    """How the lines of a file are divided: by which delimiter, into how many fields, and which one is the score."""

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
    """Returns the columns of a first line of words and a score; None if it is none."""
    score = next((place for place, field in enumerate(fields) if place > 1 and _is_number(field)), None)
    if score is None or (delimiter is None and len(fields) != 3):  # a word with a space makes two fields
        return None
    return _Columns(delimiter, len(fields), score)


def _is_number(text: str) -> bool:
    return math.isfinite(_number(text))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
