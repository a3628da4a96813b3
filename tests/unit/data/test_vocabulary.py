from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedtrain.data import vocabulary as module
from embedtrain.data.vocabulary import Vocabulary, WordCounts, WordRows
from embedtrain.errors import UserError


def counted(words: list[str]) -> pa.Table:
    counts = WordCounts()
    counts.add(pa.array([word.encode() for word in words], pa.large_binary()))
    return counts.table()


@given(st.lists(st.lists(st.sampled_from(["a", "B", "é", "中", "zz"]), max_size=20), max_size=6))
def test_counts_every_word(batches: list[list[str]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_MERGE_ROWS", 3)
        counts, again = WordCounts(), WordCounts()
        for words in batches:
            counts.add(pa.array([word.encode() for word in words], pa.large_binary()))
            again.merge(counted(words))
        expected = Counter(word.encode() for words in batches for word in words)
        for table in (counts.table(), again.table()):
            pairs = zip(table["word"].to_pylist(), table["count"].to_pylist(), strict=True)
            assert dict(pairs) == dict(expected)


@given(st.lists(st.text("ab\u00e9", max_size=3), unique=True), st.lists(st.text("ab\u00e9", max_size=3), max_size=60))
def test_words_have_the_rows_of_their_places(known: list[str], words: list[str]) -> None:
    rows = WordRows(pa.array([word.encode() for word in known], pa.large_binary()))
    found = rows.of(pa.array([word.encode() for word in words], pa.large_binary()))
    assert found.dtype == np.int32
    assert found.tolist() == [known.index(word) if word in known else -1 for word in words]


def test_order_is_by_count_and_then_by_word() -> None:
    vocabulary = Vocabulary.build(counted(list("béaacczzzb")), min_count=1, max_size=None)
    assert vocabulary.words == ["z", "a", "b", "c", "é"]
    assert vocabulary.counts.tolist() == [3, 2, 2, 2, 1]
    assert str(vocabulary.counts.dtype) == "int64"


def test_min_count_and_max_size() -> None:
    counts = counted(list("aaabbbccd"))
    assert Vocabulary.build(counts, 2, None).words == ["a", "b", "c"]
    assert Vocabulary.build(counts, 2, 1).words == ["a"]
    assert len(Vocabulary.build(counts, 1, 100)) == 4


def test_rows() -> None:
    vocabulary = Vocabulary.build(counted(["a", "a", "b"]), 1, None)
    assert vocabulary.row_of("b") == 1
    assert vocabulary.row_of("x") is None
    assert vocabulary.rows_of(["b", "x", "a"]).tolist() == [1, -1, 0]


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_saved_and_loaded(tmp_path: Path, scheme: str) -> None:
    path = f"memory://{tmp_path.name}/v.tsv" if scheme == "memory" else str(tmp_path / "v.tsv")
    # Only bytes up to a space part words, so a word may hold what Python counts as a line end.
    vocabulary = Vocabulary.build(counted(["é", "é", "x\u2028y", "x\x85y", "\u00a0"]), 1, None)
    vocabulary.save(path)
    loaded = Vocabulary.load(path)
    assert loaded.words == vocabulary.words
    assert loaded.counts.tolist() == vocabulary.counts.tolist()
    assert loaded.fingerprint == vocabulary.fingerprint


def test_fingerprint_depends_on_words_and_counts() -> None:
    texts = ["aab", "aac", "aabb"]
    assert len({Vocabulary.build(counted(list(t)), 1, None).fingerprint for t in texts}) == 3


def test_an_empty_vocabulary_says_what_was_seen() -> None:
    with pytest.raises(UserError) as error:
        Vocabulary.build(counted(["the", "cat", "the", "dog"]), 5, None)
    assert str(error.value) == (
        "the vocabulary is empty: 3 distinct words were seen, the most frequent ('the') 2 times, and min_count is 5"
    )
    with pytest.raises(UserError, match="the vocabulary is empty: the text holds no words"):
        Vocabulary.build(counted([]), 5, None)


@pytest.mark.parametrize("content", ["word\n", "a\tb\n", "a\t1\t2\n", "", "a\t1\n\nb\t1\n"])
def test_a_file_that_is_no_vocabulary_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "v.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path} is not a vocabulary: expected lines of word, tab, count"):
        Vocabulary.load(str(path))


def test_a_vocabulary_grows_by_new_words_and_keeps_its_own() -> None:
    old = Vocabulary(["a", "b", "c"], np.array([9, 5, 5]))
    counts = counted(list("bbbbbbbddddddeea"))
    grown = old.extended(counts, min_count=3, max_size=None)
    assert list(zip(grown.words, grown.counts.tolist(), strict=True)) == [("b", 12), ("a", 10), ("d", 6), ("c", 5)]
    assert old.extended(counts, min_count=1, max_size=4).words == ["b", "a", "d", "c"]
    assert sorted(old.extended(counts, min_count=1, max_size=2).words) == ["a", "b", "c"]
    same = old.extended(counts, min_count=1, max_size=None, takes_new=False)
    assert list(zip(same.words, same.counts.tolist(), strict=True)) == [("b", 12), ("a", 10), ("c", 5)]
    with pytest.raises(UserError, match="holds no words"):
        old.extended(counted([]), min_count=1, max_size=None)


def test_a_base_vocabulary_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.base_vocabulary: there is no file .*nowhere\.tsv"):
        Vocabulary.load_base(str(tmp_path / "nowhere.tsv"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\t5\nb\t9223372036854775807\n", r"line 2: expected a count from 1 on, .*got 9223372036854775807"),
        ("a\t92233720368547758070\n", r"line 1: expected a count from 1 on"),
        (f"a\t{1 << 61}\nb\t{1 << 61}\nc\t1\n", r"line 3: .*all counts together"),
        ("a\t-7\n", r"line 1: expected a count from 1 on, .*got -7"),
        ("a\t0\n", r"line 1: expected a count from 1 on, .*got 0"),
        ("a\t5\na\t1\n", r"line 2: the word 'a' stands on an earlier line too"),
        ("a\t5\nb 1\n", r"line 2: expected a word, a tab and a count, got 'b 1'"),
        ("a\t5\n\t1\n", r"line 2: expected a word, a tab and a count"),
        ("a\t1_000\n", r"line 1: expected a word, a tab and a count"),
        ("", r"line 1: expected a word, a tab and a count, got ''"),
    ],
)
def test_a_base_vocabulary_is_checked_line_by_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "base.tsv").write_text(content)
    with pytest.raises(UserError, match=rf"users\.base_vocabulary: .*base\.tsv, {message}"):
        Vocabulary.load_base(str(tmp_path / "base.tsv"), "users.base_vocabulary")


def test_a_base_vocabulary_of_another_program_has_no_mark_and_no_returns_in_words(tmp_path: Path) -> None:
    (tmp_path / "base.tsv").write_bytes(b"\xef\xbb\xbfa\t5\r\nb\t1\r\n")
    base = Vocabulary.load_base(str(tmp_path / "base.tsv"))
    assert (base.words, base.counts.tolist()) == (["a", "b"], [5, 1])
