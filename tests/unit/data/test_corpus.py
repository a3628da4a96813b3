from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from embedtrain.data.corpus import PreparedCorpus
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.distributed.ranks import ONE_PROCESS


@pytest.fixture
def corpus(tmp_path: Path) -> PreparedCorpus:
    """Several shards, the middle ones without a token: their words are too rare."""
    text = tmp_path / "a.txt"
    text.write_text("a b a\nb a\n" * 3 + "x y z q r s\nu v w k l\n" + "b b\na\n" * 3)
    options = CorpusOptions(path=str(text), min_count=2)
    return prepare_corpus(options, str(tmp_path / "cache"), ONE_PROCESS, part_bytes=10)


EXPECTED = [~0, 1, 0, ~1, 0] * 3 + [~1, 1, ~0] * 3


def all_tokens(corpus: PreparedCorpus) -> list[int]:
    return corpus.take(np.arange(corpus.num_tokens)).tolist()


def test_takes_any_positions_across_shards(corpus: PreparedCorpus) -> None:
    assert corpus.num_tokens == len(EXPECTED)
    assert corpus.num_sentences == 12
    assert corpus.vocabulary.words == ["a", "b"]
    assert all_tokens(corpus) == EXPECTED
    positions = np.random.default_rng(1).permutation(len(EXPECTED)).repeat(2)
    for count in range(len(positions) + 1):
        tokens = corpus.take(positions[:count])
        assert tokens.dtype == np.int32
        assert tokens.flags.writeable
        assert tokens.tolist() == [EXPECTED[position] for position in positions[:count]]


@pytest.mark.parametrize("position", [-1, len(EXPECTED)])
def test_a_position_outside_is_refused(corpus: PreparedCorpus, position: int) -> None:
    with pytest.raises(IndexError):
        corpus.take(np.array([0, position]))


def test_is_pickled_by_its_path(corpus: PreparedCorpus) -> None:
    corpus.take(np.arange(3))
    data = pickle.dumps(corpus)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.fingerprint == corpus.fingerprint
    assert all_tokens(again) == EXPECTED


def test_a_shard_of_another_size_is_refused(corpus: PreparedCorpus) -> None:
    path = Path(corpus.path) / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match=rf"{path} has 19 bytes instead of 20: remove the folder"):
        PreparedCorpus(corpus.path).take(np.arange(1))


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"meta\.json"):
        PreparedCorpus(str(tmp_path))
