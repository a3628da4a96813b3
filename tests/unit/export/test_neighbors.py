from __future__ import annotations

import numpy as np
import pytest

from embedtrain.cli import main
from embedtrain.errors import UserError
from embedtrain.export import export_vectors, neighbors, open_vectors


def random_table(num_rows, dim=8):
    return np.random.default_rng(num_rows).normal(size=(num_rows, dim)).astype(np.float32)


@pytest.mark.parametrize(
    ("query", "positive", "negative"),
    [
        ("king", ["king"], []),
        ("  king ", ["king"], []),
        ("king - man + woman", ["king", "woman"], ["man"]),
        ("- man + king", ["king"], ["man"]),
        ("+ king + king - it's", ["king", "king"], ["it's"]),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 4 * 8 * 7, 16 << 20])
def test_equals_gensim_most_similar(query, positive, negative, block_bytes, make_run, tmp_path, monkeypatch):
    keyedvectors = pytest.importorskip("gensim.models", reason="gensim is not installed").KeyedVectors
    monkeypatch.setattr("embedtrain.export.vectors._BLOCK_BYTES", block_bytes)
    words = ["the", "king", "man", "woman", "it's", *(f"w{i}" for i in range(45))]
    vectors = open_vectors(make_run({"word": random_table(50)}, words))
    (path,) = export_vectors(vectors, "word2vec-binary", str(tmp_path / "out"))
    reference = keyedvectors.load_word2vec_format(path, binary=True)
    expected = reference.most_similar(positive=positive, negative=negative, topn=10)
    found = neighbors(vectors, query)
    assert [word for word, _ in found] == [word for word, _ in expected]
    np.testing.assert_allclose([c for _, c in found], [c for _, c in expected], rtol=1e-5, atol=1e-6)


def test_top_may_exceed_the_table(vectors):
    found = neighbors(vectors, "king - man", top=100)
    assert sorted(word for word, _ in found) == sorted(set(vectors.words) - {"king", "man"})
    assert all(type(cosine) is float for _, cosine in found)


def test_equal_vectors_come_in_the_order_of_the_rows(make_run):
    vectors = open_vectors(make_run({"item": np.ones((9, 2), np.float32)}))
    assert [word for word, _ in neighbors(vectors, "3", top=4)] == ["0", "1", "2", "4"]


def test_words_that_look_like_expressions(make_run):
    words = ["+", "-", "New York", "a - b", "c"]
    vectors = open_vectors(make_run({"word": random_table(5)}, words))
    for word in words:
        assert sorted(found for found, _ in neighbors(vectors, word)) == sorted(set(words) - {word})
    assert len(neighbors(vectors, "c - + + -")) == 2


@pytest.mark.parametrize("query", ["king queen", "king -", "king - - man", "king + man woman"])
def test_unreadable_queries(query, vectors):
    with pytest.raises(UserError, match=r"cannot parse the query '.*': expected .* 'king - man \+ woman'"):
        neighbors(vectors, query)


def test_users_mistakes(vectors):
    with pytest.raises(UserError, match=r"unknown word 'kin'.*did you mean 'king'"):
        neighbors(vectors, "kin - man")
    with pytest.raises(UserError, match=r"unknown word 'King'.*did you mean 'king'\?"):
        neighbors(vectors, "King")
    with pytest.raises(UserError, match="unknown word ''"):
        neighbors(vectors, " ")
    with pytest.raises(UserError, match="add up to zero"):
        neighbors(vectors, "king - king")
    with pytest.raises(UserError, match="at least 1, got 0"):
        neighbors(vectors, "king", top=0)


def test_a_table_of_one_row_has_no_neighbours_and_says_so(make_run, capfd):
    run = make_run({"word": random_table(1)}, ["king"])
    assert main(["neighbors", str(run), "king"]) == 0
    assert capfd.readouterr().out.splitlines() == ["king", "  nothing is left: the table has no other row"]
