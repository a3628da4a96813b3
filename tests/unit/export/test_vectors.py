from __future__ import annotations

import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from embedtrain.errors import CheckpointError, UserError
from embedtrain.export import open_vectors, unit_rows


def random_table(num_rows, dim=4):
    return np.random.default_rng(num_rows).normal(size=(num_rows, dim)).astype(np.float32)


def test_rows_come_in_the_order_of_the_ids(vectors, table):
    np.testing.assert_array_equal(vectors.rows(0, 10), table)
    np.testing.assert_array_equal(vectors.rows(3, 5), table[3:5])
    assert (vectors.num_rows, vectors.dim, vectors.step, vectors.table) == (10, 6, 12, "word")
    assert vectors.rows(0, 2).dtype == np.float32


@pytest.mark.parametrize("block_rows", [1, 3, 10, 100, None])
def test_blocks_cover_the_table_in_order(vectors, table, block_rows):
    blocks = list(vectors.blocks(block_rows))
    assert [start for start, _ in blocks] == list(range(0, 10, block_rows or 10))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), table)


def test_words_and_counts_come_from_the_vocabulary(vectors):
    assert vectors.words[:3] == ["the", "king", "queen"]
    assert vectors.counts.tolist() == list(range(1000, 990, -1))
    assert vectors.row_of("日本") == 6


def test_first_rows_alone(vectors, table):
    first = vectors.first(4)
    assert (first.num_rows, first.words, len(first.counts)) == (4, ["the", "king", "queen", "man"], 4)
    np.testing.assert_array_equal(np.concatenate([block for _, block in first.blocks(3)]), table[:4])
    assert vectors.first(99).num_rows == 10


def test_the_newest_checkpoint_is_read(make_run):
    run_path = make_run({"item": random_table(5)}, step=3)
    make_run({"item": random_table(7)}, step=20)
    with open_vectors(run_path) as vectors:
        assert (vectors.step, vectors.num_rows) == (20, 7)


def test_half_precision_becomes_float32(make_run):
    values = random_table(5)
    with open_vectors(make_run({"item": values}, dtype=torch.bfloat16)) as vectors:
        expected = torch.from_numpy(values).bfloat16().float().numpy()
        np.testing.assert_array_equal(vectors.rows(0, 5), expected)


def test_a_remote_run_folder(make_run):
    values = random_table(5)
    local = make_run({"item": values})
    memory = fsspec.filesystem("memory")
    memory.put(local, "/vectors-test/run", recursive=True)
    try:
        with open_vectors("memory://vectors-test/run") as vectors:
            np.testing.assert_array_equal(vectors.rows(0, 5), values)
    finally:
        memory.rm("/vectors-test", recursive=True)


def test_a_table_without_a_vocabulary_has_row_numbers_for_words(make_run):
    with open_vectors(make_run({"item": random_table(12)})) as vectors:
        assert list(vectors.words[9:]) == ["9", "10", "11"]
        assert vectors.counts is None
        assert vectors.row_of("11") == 11
        assert "3" in vectors.words
        for word in ("12", "-1", "03", "x", "²", "9" * 5000):
            assert word not in vectors.words
            with pytest.raises(UserError, match="unknown row"):
                vectors.row_of(word)


def test_the_vocabulary_goes_to_tables_of_its_length_alone(make_run):
    tables = {"center": random_table(3), "context": random_table(3), "topic": random_table(5)}
    run_path = make_run(tables, ["a", "b", "c"], state={"export_table": "center"})
    first_words = {name: open_vectors(run_path, name).words[0] for name in tables}
    assert first_words == {"center": "a", "context": "a", "topic": "0"}
    assert open_vectors(run_path).table == "center"


def test_words_may_hold_rare_separators(make_run):
    words = ["a\u2028b", "c\x85", "d e", " "]
    assert open_vectors(make_run({"word": random_table(4)}, words)).words == words


def test_unknown_word_suggests_close_ones(vectors):
    with pytest.raises(UserError, match=r"unknown word 'quen': it is not one of the 10 words of .*'queen'"):
        vectors.row_of("quen")


def test_missing_run_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"nowhere' is not a run folder"):
        open_vectors(str(tmp_path / "nowhere"))


def test_unknown_protocol():
    with pytest.raises(UserError, match="nosuch://bucket/run: Protocol not known"):
        open_vectors("nosuch://bucket/run")


def test_no_checkpoint_yet(tmp_path: Path):
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        open_vectors(str(tmp_path))


def test_unknown_table_lists_the_tables(make_run):
    run_path = make_run({"user": random_table(3), "item": random_table(4)})
    with pytest.raises(UserError, match=r"has no table 'itme'; it has item, user"):
        open_vectors(run_path, "itme")
    with pytest.raises(UserError, match=r"has no default table: name one with --table NAME: item, user"):
        open_vectors(run_path)


def test_vocabulary_missing_or_of_another_length(make_run):
    state = {"export_table": "word"}
    run_path = make_run({"word": random_table(3)}, state=state)
    with pytest.raises(UserError, match=r"table 'word' needs 3 words in .*vocabulary.tsv, but there is none"):
        open_vectors(run_path)
    shutil.rmtree(run_path)
    run_path = make_run({"word": random_table(3)}, ["a", "b"], state=state)
    with pytest.raises(UserError, match="but it has 2 words"):
        open_vectors(run_path)


def test_unreadable_vocabulary(make_run):
    run_path = make_run({"word": random_table(3)}, ["a", "b", "c"])
    Path(run_path, "vocabulary.tsv").write_bytes(b"a\t3\nb\n")
    with pytest.raises(UserError, match=r"vocabulary\.tsv is not a vocabulary: expected lines of word, tab, count"):
        open_vectors(run_path)


def test_rows_of_another_layout_are_refused(make_run, monkeypatch):
    run_path = make_run({"item": random_table(50)})
    monkeypatch.setattr("embedtrain.sharding.layout.spread_multiplier", lambda modulus: 7)
    with pytest.raises(CheckpointError, match="'multiplier': 7"):
        open_vectors(run_path)


def test_unit_rows_leave_zero_rows_alone():
    rows = unit_rows(np.array([[3, 4], [0, 0]], dtype=np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert rows.dtype == np.float32
