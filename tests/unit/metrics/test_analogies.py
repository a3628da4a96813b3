from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedtrain.errors import UserError
from embedtrain.metrics import AnalogySection, evaluate_analogies


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def structured_vectors(num_pairs, rng, noise):
    """Pairs (2i, 2i + 1) that differ by one direction, so that a good share of the analogies holds."""
    base = rng.normal(size=(num_pairs, 8))
    rows = np.stack([base, base + 2 * rng.normal(size=8)], axis=1).reshape(2 * num_pairs, 8)
    return unit(rows + noise * rng.normal(size=rows.shape))


def assert_as_gensim(vectors, words, text, tmp_path, **options):
    keyedvectors = pytest.importorskip("gensim.models", reason="gensim is not installed").KeyedVectors
    reference = keyedvectors(vectors.shape[1])
    reference.add_vectors(words, vectors)
    path = tmp_path / "questions.txt"
    path.write_text(text, encoding="utf-8")
    expected_accuracy, expected_sections = reference.evaluate_word_analogies(str(path), **options)
    with path.open(encoding="utf-8") as lines:
        report = evaluate_analogies(vectors, words, lines, **options)
    expected = [
        AnalogySection(s["section"], len(s["correct"]), len(s["correct"] + s["incorrect"]))
        for s in expected_sections[:-1]
    ]
    assert list(report.sections) == expected
    assert report.total.accuracy == expected_accuracy
    assert report.total.num_questions == sum(section.num_questions for section in expected)
    assert report.total.num_questions + report.num_oov == sum(
        bool(line) and not line.startswith(":") for line in text.splitlines()
    )
    return report


@pytest.mark.parametrize("case_insensitive", [True, False])
@pytest.mark.parametrize("restrict_vocab", [60, 300_000])
@pytest.mark.parametrize("max_scores", [1, 1000, 1 << 24])
def test_counts_as_gensim(case_insensitive, restrict_vocab, max_scores, tmp_path, monkeypatch):
    monkeypatch.setattr("embedtrain.metrics.analogies._MAX_SCORES", max_scores)
    rng = np.random.default_rng(1)
    # Spelled in two cases, so that words collapse and other spellings of the question's words are near.
    names = [f"{'Ab' if row % 3 else 'aB'}{row % 70}" for row in range(100)]
    words = [name if name not in names[:row] else name.swapcase() for row, name in enumerate(names)]
    assert len(set(words)) == 100
    lines = []
    for section in range(4):
        lines.append(f": section {section}" if section != 2 else ":  empty")
        for _ in range(60 if section != 2 else 0):
            i, j = 2 * rng.integers(0, 50, size=2)
            lines.append(" ".join([words[i], words[i + 1], words[j], words[j + 1]]))
            lines.append(" ".join(rng.choice([*words, "unknown"], 4)))
        lines.append("")
    vectors = structured_vectors(50, rng, noise=0.1)
    options = {"restrict_vocab": restrict_vocab, "case_insensitive": case_insensitive}
    report = assert_as_gensim(vectors, words, "\n".join(lines), tmp_path, **options)
    assert 0.1 < report.total.accuracy < 0.9
    assert report.num_oov > 0


@pytest.mark.parametrize("num_words", [2, 3, 4, 6, 9])
def test_few_words_and_many_spellings_of_them(num_words, tmp_path):
    rng = np.random.default_rng(num_words)
    words = ["ab", "Ab", "aB", "AB", "c", "C", "d", "ß", "SS"][:num_words]
    questions = [" ".join(rng.choice(words, 4)) for _ in range(300)]
    for case_insensitive in (True, False):
        vectors = unit(rng.normal(size=(num_words, 3)))
        text = "\n".join([": all", *questions])
        assert_as_gensim(vectors, words, text, tmp_path, case_insensitive=case_insensitive)


def test_the_real_questions_on_random_vectors(tmp_path):
    file = Path(__file__).parents[4] / "shared/data/eval-words/questions-words.txt"
    if not file.exists():
        pytest.skip("the analogies of ../shared/data are not here")
    text = file.read_text(encoding="utf-8")
    words = sorted({word.lower() for word in text.split()})[:300]
    vectors = unit(np.random.default_rng(0).normal(size=(len(words), 4)))
    report = assert_as_gensim(vectors, words, text, tmp_path)
    assert len(report.sections) == 14
    assert report.total.num_correct > 0


def test_all_words_unknown_is_a_result():
    report = evaluate_analogies(unit(np.ones((1, 2))), ["x"], [": s\n", "a b c d\n"])
    assert report.sections == (AnalogySection("s", 0, 0),)
    assert (report.total.accuracy, report.num_oov) == (0.0, 1)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([": s", "a b c d", "a b c"], r"q.txt, line 3: expected four words, got 'a b c'"),
        (["", "a b c d"], r"q.txt, line 2: expected a line ': SECTION' before the first question, got 'a b"),
        ([], "q.txt: expected lines ': SECTION' and lines of four words, found no question"),
        ([": s", ""], "found no question"),
    ],
)
def test_malformed_files(lines, message):
    with pytest.raises(UserError, match=message):
        evaluate_analogies(unit(np.eye(4)), list("abcd"), lines, source="q.txt")


def test_a_byte_order_mark_tabs_and_a_section_without_a_space():
    lines = ["\ufeff: s", "a\tb\tc\td", ":t", "a b c d"]
    report = evaluate_analogies(unit(np.eye(4)), list("abcd"), lines)
    assert [(section.name, section.num_questions) for section in report.sections] == [("s", 1), ("t", 1)]
