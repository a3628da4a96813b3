"""Accuracy on word analogies (a is to b as c is to d), computed as in gensim 4.4."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedtrain.errors import UserError
from embedtrain.metrics.word_lookup import WordLookup, require_vocab

_MAX_SCORES = 1 << 24
_CANDIDATES = 5


@dataclass(frozen=True)
class AnalogySection:
    """Holds the result of one section of questions.

    Attributes:
        name: name of the section.
        num_correct: number of correct answers.
        num_questions: number of questions whose four words are all in the vocabulary.
    """

    name: str
    num_correct: int
    num_questions: int

    @property
    def accuracy(self) -> float:
        """Share of the questions with a correct answer; 0 without questions, as in gensim."""
        return self.num_correct / self.num_questions if self.num_questions else 0.0


@dataclass(frozen=True)
class AnalogyReport:
    """Holds the result of `evaluate_analogies`.

    Attributes:
        sections: results per section, in the order of the file.
        total: result over all sections.
        num_oov: number of questions that are left out, because a word is not in the restricted vocabulary.
    """

    sections: tuple[AnalogySection, ...]
    total: AnalogySection
    num_oov: int


@dataclass(frozen=True)
class _Questions:
    """Holds the questions whose words are all known.

    Attributes:
        section_names: names of the sections.
        rows: [q, 4] int64; rows of the words a, b, c and d.
        sections: [q] int64; section of each question.
        num_oov: number of other questions.
    """

    section_names: list[str]
    rows: npt.NDArray[np.int64]
    sections: npt.NDArray[np.int64]
    num_oov: int


def evaluate_analogies(
    unit_vectors: npt.NDArray[np.float32],
    words: Sequence[str],
    lines: Iterable[str],
    restrict_vocab: int = 300_000,
    case_insensitive: bool = True,
    source: str = "analogies",
) -> AnalogyReport:
    """Answers analogy questions by 3CosAdd: the word nearest to b - a + c, other than a, b and c.

    Args:
        unit_vectors: [n, dim] vectors of length 1, the most frequent word first.
        words: [n] words.
        lines: lines of the file: `: NAME` begins a section, a line of four words is a question.
        restrict_vocab: number of words, from the first, that are looked up and can be answers.
        case_insensitive: whether words are compared in upper case.
        source: name of the file of questions in messages.

    Raises:
        UserError: a line is neither a section nor a question, there is no question, or `restrict_vocab` is below 1.
            For a line the message names file and line.

    Source: Mikolov et al. 2013, "Linguistic Regularities in Continuous Space Word Representations"; details
        as in `gensim.models.KeyedVectors.evaluate_word_analogies` with dummy4unknown=False.
    """
    require_vocab(restrict_vocab)
    lookup = WordLookup(words[:restrict_vocab], case_insensitive)
    questions = _read(lines, lookup, source)
    correct = _solve(unit_vectors[:restrict_vocab], questions.rows, lookup.first_rows)
    num_sections = len(questions.section_names)
    num_correct = np.bincount(questions.sections[correct], minlength=num_sections)
    num_questions = np.bincount(questions.sections, minlength=num_sections)
    sections = map(AnalogySection, questions.section_names, num_correct.tolist(), num_questions.tolist())
    total = AnalogySection("total", int(correct.sum()), len(correct))
    return AnalogyReport(tuple(sections), total, questions.num_oov)


def _read(lines: Iterable[str], lookup: WordLookup, source: str) -> _Questions:
    names: list[str] = []
    known: list[list[int]] = []
    sections: list[int] = []
    num_oov = 0
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix("\ufeff")
        words = line.split()
        if line.startswith(": ") or (line.startswith(":") and len(words) != 4):
            names.append(line.lstrip(": ").strip())
        elif words and (len(words) != 4 or not names):
            expected = "four words" if names else "a line ': SECTION' before the first question"
            raise UserError(f"{source}, line {number}: expected {expected}, got {line.rstrip()!r}")
        elif words:
            rows = [row for row in map(lookup.row_of, words) if row is not None]
            if len(rows) == 4:
                known.append(rows)
                sections.append(len(names) - 1)
            else:
                num_oov += 1
    if not known and not num_oov:
        raise UserError(f"{source}: expected lines ': SECTION' and lines of four words, found no question")
    return _Questions(names, np.array(known, np.int64).reshape(-1, 4), np.array(sections, np.int64), num_oov)


def _solve(
    vectors: npt.NDArray[np.float32], questions: npt.NDArray[np.int64], first_rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Returns [q] whether each answer is correct. Works in batches of at most `_MAX_SCORES` scores."""
    correct = np.zeros(len(questions), dtype=np.bool_)
    batch_size = max(1, _MAX_SCORES // len(vectors)) if len(questions) else 1
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        a, b, c, expected = batch.T
        scores = (vectors[b] - vectors[a] + vectors[c]) @ vectors.T
        np.put_along_axis(scores, batch[:, :3], -np.inf, axis=1)
        correct[start : start + batch_size] = _answers(scores, batch[:, :3], first_rows) == expected
    return correct


def _answers(
    scores: npt.NDArray[np.float32], given: npt.NDArray[np.int64], first_rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Returns [q] the best row that is not another spelling of a given word [q, 3]; -1 if no row is left.

    Overwrites `scores` [q, n]. As in gensim, only the five best rows are checked; if all five are other spellings, the
    fifth is the answer.
    """
    answers = np.full(len(scores), -1, dtype=np.int64)
    searching = np.arange(len(scores))
    for _ in range(_CANDIDATES):
        best = scores[searching].argmax(axis=1) if len(searching) < len(scores) else scores.argmax(axis=1)
        left = scores[searching, best] > -np.inf
        searching, best = searching[left], best[left]
        answers[searching] = first_rows[best]
        scores[searching, best] = -np.inf
        searching = searching[(given[searching] == answers[searching, None]).any(axis=1)]
    return answers
