from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from embedtrain.data.readers.blocks import read_lines
from embedtrain.errors import UserError
from embedtrain.metrics import evaluate_similarity
from embedtrain.metrics.word_similarity import check_pairs, read_pairs

EVAL_WORDS = Path(__file__).parents[4] / "shared/data/eval-words"


def random_unit_vectors(num_words):
    rows = np.random.default_rng(num_words).normal(size=(num_words, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def assert_as_gensim(vectors, words, path, **options):
    keyedvectors = pytest.importorskip("gensim.models", reason="gensim is not installed").KeyedVectors
    reference = keyedvectors(vectors.shape[1])
    reference.add_vectors(words, vectors)
    pearson, spearman, oov_percent = reference.evaluate_word_pairs(str(path), **options)
    with open(path, encoding="utf-8") as lines:
        report = evaluate_similarity(vectors, words, lines, **options)
    assert report.pearson == pytest.approx(pearson[0], abs=1e-6)
    assert report.spearman == pytest.approx(spearman[0], abs=1e-6)
    assert 100 * report.oov_ratio == pytest.approx(oov_percent)
    return report


@pytest.mark.parametrize("case_insensitive", [True, False])
@pytest.mark.parametrize("restrict_vocab", [25, 300_000])
def test_counts_as_gensim(case_insensitive, restrict_vocab, tmp_path):
    rng = np.random.default_rng(2)
    words = [f"{'Ab' if row % 2 else 'aB'}{row // 2}" for row in range(40)]
    lines = ["# a comment", "#another\twith\ttabs"]
    for _ in range(200):
        left, right = rng.choice([*words, "ab3", "unknown"], 2, replace=False)
        lines.append(f"{left}\t{right}\t{rng.integers(0, 100) / 10}")
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join([*lines, "", ""]))
    options = {"case_insensitive": case_insensitive, "restrict_vocab": restrict_vocab}
    report = assert_as_gensim(random_unit_vectors(40), words, path, **options)
    assert 0 < report.oov_ratio < 1
    assert report.num_pairs == round(200 * (1 - report.oov_ratio))


@pytest.mark.parametrize("name", ["WS-353-ALL", "MEN-TR-3k", "RG-65", "SIMLEX-999"])
def test_published_pairs_as_gensim(name):
    path = EVAL_WORDS / f"EN-{name}.txt"
    if not path.exists():
        pytest.skip("the word pairs of ../shared/data are not here")
    words = sorted({word for line in path.read_text().splitlines() for word in line.split("\t")[:2]})[::2]
    assert_as_gensim(random_unit_vectors(len(words)), words, path)


def test_white_space_is_detected():
    lines = ["# words\tand scores\n", "\n", "a  b 3\n", "b c 2\n", "a c 0.5\n", "a x 1\n"]
    report = evaluate_similarity(np.array([[1, 0], [0.6, 0.8], [0, 1]], np.float32), ["a", "b", "c"], lines)
    assert report.num_pairs == 3
    assert report.oov_ratio == 0.25


def test_words_with_spaces_need_tabs():
    lines = ["new york\tcity\t3", "city\tnew york\t2", "city\tcity\t9"]
    report = evaluate_similarity(np.array([[1, 0], [0.6, 0.8]], np.float32), ["New York", "city"], lines)
    assert report.num_pairs == 3


@pytest.mark.parametrize(
    "text",
    [
        "\ufeffa\tb\t8.5\nb\tc\t7\n",
        "Word 1\tWord 2\tHuman (mean)\na\tb\t8.5\nb\tc\t7\n",
        "# SimLex\nword1\tword2\tPOS\tSimLex999\tconc(w1)\na\tb\tA\t8.5\t2\nb\tc\tN\t7\t3\n",
        "Word 1,Word 2,Human (mean)\na,b,8.5\nb,c,7\n",
        '"a", "b", 8.5\r\n"b","c",7\r\n',
        "a\tb\t8.5\t9\t8\nb\tc\t7\t6\t\n",
        "a b 8.5\nb c 7\n",
        "word1 word2 score\na b 8.5\nb c 7",
    ],
    ids=["mark", "header", "SimLex", "CSV", "quoted", "further columns", "spaces", "header of spaces"],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_published_layouts(tmp_path, text, suffix):
    path = tmp_path / f"pairs{suffix}"
    path.write_bytes(gzip.compress(text.encode()) if suffix else text.encode())
    assert list(read_pairs(read_lines(str(path)), "pairs")) == [("a", "b", 8.5), ("b", "c", 7.0)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a\tb", "a\tb\t1"], "line 1: expected two words and a score, separated by tabs"),
        (["a\tb\tscore", "c\td\tscore"], "line 2: .* separated by tabs"),
        (["a,b,1", "a b 1"], "line 2: .* separated by commas, got 'a b 1'"),
        (["new york city 3"], "line 1: .* separated by spaces"),
        (["a\tb\t1", "a\t\t2"], "line 2"),
        (["a b nan", "b c 1"], "line 1: .* got 'a b nan'"),
    ],
)
def test_what_is_no_header_and_no_pair_is_refused_with_its_line(lines, message):
    with pytest.raises(UserError, match=message):
        list(read_pairs(lines, "pairs"))


@pytest.mark.parametrize(
    ("line", "separator"),
    [("a\tb", "tabs"), ("a\tb\tx", "tabs"), ("a\tb\tnan", "tabs"), ("a b 3", "tabs"), ("a\tb\t1\t2", "tabs")],
)
def test_malformed_lines_are_named(line, separator):
    message = f"pairs.tsv, line 2: expected two words and a score, separated by {separator}, got {line!r}"
    lines = ["a\tb\t1", line + "\n"]
    with pytest.raises(UserError) as caught:
        evaluate_similarity(np.eye(2, dtype=np.float32), ["a", "b"], lines, source="pairs.tsv")
    assert str(caught.value).startswith(message)


def test_equal_scores_are_refused():
    with pytest.raises(UserError, match="pairs: all pairs of known words have the score 3, so nothing can be compared"):
        evaluate_similarity(np.eye(2, dtype=np.float32), ["a", "b"], ["a b 3", "b a 3", "a x 4"], source="pairs")
    with pytest.raises(UserError, match=r"pairs: all pairs have the score 0\.5"):
        check_pairs(["a b 0.5", "c d 0.5"], "pairs")


def test_too_few_known_pairs():
    lines = ["a b 1", "a x 2", "y x 2"]
    with pytest.raises(UserError, match="pairs: expected at least two pairs of known words, found 1"):
        evaluate_similarity(np.eye(2, dtype=np.float32), ["a", "b"], lines, source="pairs")
