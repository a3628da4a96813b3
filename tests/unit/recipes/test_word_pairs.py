"""The measure of word vectors during training: which pairs count."""

from __future__ import annotations

from embedtrain.recipes.word2vec.model import Word2Vec
from embedtrain.recipes.word2vec.recipe import WordSimilarity


def test_pairs_with_an_unknown_word_are_counted() -> None:
    words = ["cat", "Dog", "tree"]
    lines = {
        "all.tsv": ["cat\tdog\t9", "dog\ttree\t1"],
        "some.tsv": ["word1,word2,score", "CAT,dog,9", "cat,cow,8", "cow,cow,10", "tree,dog,1"],
    }
    measure = WordSimilarity(Word2Vec(len(words), 4).tables, words, lines)
    assert measure.count_unknown() == {"all.tsv": (0, 2), "some.tsv": (2, 4)}
    assert measure.words == words
