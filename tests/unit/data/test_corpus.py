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


def read(corpus: PreparedCorpus, *ranges: tuple[int, int]) -> np.ndarray:
    starts, stops = np.array(ranges, np.int64).reshape(-1, 2).T
    return corpus.read(starts, stops)


def test_reads_any_ranges_across_shards(corpus: PreparedCorpus) -> None:
    num_tokens = corpus.num_tokens
    assert num_tokens == len(EXPECTED)
    assert corpus.num_sentences == 12
    assert corpus.vocabulary.words == ["a", "b"]
    ranges = [(start, stop) for start in range(num_tokens + 1) for stop in range(start, num_tokens + 1)]
    for each in ranges:
        tokens = read(corpus, each)
        assert tokens.dtype == np.int32
        assert tokens.flags.writeable
        assert tokens.tolist() == EXPECTED[slice(*each)]
    mixed = [ranges[at] for at in np.random.default_rng(1).permutation(len(ranges))]
    assert read(corpus, *mixed).tolist() == [token for each in mixed for token in EXPECTED[slice(*each)]]
    assert read(corpus).tolist() == []


@pytest.mark.parametrize("bounds", [(-1, 2), (3, 2), (0, len(EXPECTED) + 1)])
def test_a_range_outside_is_refused(corpus: PreparedCorpus, bounds: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"ranges must be inside \[0, 24\], got \[{bounds[0]}, {bounds[1]}\)"):
        read(corpus, (0, 2), bounds)


def test_is_pickled_by_its_path(corpus: PreparedCorpus) -> None:
    read(corpus, (0, 3))
    data = pickle.dumps(corpus)
    assert len(data) < 500
    again = pickle.loads(data)
    assert again.fingerprint == corpus.fingerprint
    assert read(again, (0, again.num_tokens)).tolist() == EXPECTED


def test_a_shard_of_another_size_is_refused(corpus: PreparedCorpus) -> None:
    path = Path(corpus.path) / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RuntimeError, match=rf"{path} has 19 bytes instead of 20: remove the folder"):
        read(PreparedCorpus(corpus.path), (0, 1))


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"meta\.json"):
        PreparedCorpus(str(tmp_path))
