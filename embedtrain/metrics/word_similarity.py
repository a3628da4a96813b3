"""Agreement with people's judgements of how similar two words are, counted as gensim 4.4 counts it."""

from __future__ import annotations

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
        lines: two words and a score, separated by tabs where the first pair is, else by white space; a line
            that begins with `#` is a comment.
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
    for first, second, score in _read(lines, source):
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
    num_pairs = sum(1 for _ in _read(lines, source))
    if num_pairs < 2:
        raise UserError(f"{source}: expected at least two lines of two words and a score, found {num_pairs}")


def _read(lines: Iterable[str], source: str) -> Iterator[tuple[str, str, float]]:
    delimiter: str | None = None
    seen_pair = False
    for number, line in enumerate(lines, start=1):
        if line.startswith("#") or not line.strip():
            continue
        if not seen_pair:
            delimiter, seen_pair = ("\t" if "\t" in line else None), True
        try:
            first, second, text = line.split(delimiter)
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise UserError(
                f"{source}, line {number}: expected two words and a score, separated by "
                f"{'tabs' if delimiter else 'spaces'}, got {line.rstrip()!r}; a comment begins with #"
            )
        yield first, second, score
