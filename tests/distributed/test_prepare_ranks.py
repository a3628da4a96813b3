from __future__ import annotations

import gzip
import random
from pathlib import Path

import numpy as np
import pytest

from embedtrain.data import prepare
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError
from embedtrain.testing.ranks import run_ranks
from embedtrain.testing.threads import run_threads

Result = tuple[list[int], str, list[str], str]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """One plain file of many lines, one compressed file, one without an end of line."""
    folder = tmp_path / "texts"
    folder.mkdir()
    draw = random.Random(0)
    words = ["alpha", "Beta", "gämma", "δ", "rare"]
    lines = [" ".join(draw.choices(words, [9, 7, 5, 3, 1], k=draw.randint(0, 12))) for _ in range(400)]
    (folder / "a.txt").write_text("\n".join(lines[:300]) + "\n", encoding="utf-8")
    (folder / "b.txt.gz").write_bytes(gzip.compress("\n".join(lines[300:350]).encode()))
    (folder / "c.txt").write_text("\n".join(lines[350:]), encoding="utf-8")
    return folder


def prepare_on(ranks: Ranks, path: str, cache: str) -> Result:
    options = CorpusOptions(path=path, min_count=20)
    corpus = prepare_corpus(options, cache, ranks, part_bytes=500, chunk_bytes=64)
    tokens = corpus.read(np.array([0]), np.array([corpus.num_tokens])).tolist()
    return tokens, corpus.fingerprint, corpus.vocabulary.words, corpus.path


def test_the_tokens_do_not_depend_on_the_number_of_ranks(tmp_path: Path, texts: Path) -> None:
    results: list[Result] = []
    for world_size in (1, 2, 3):
        results += run_threads(world_size, prepare_on, str(texts), str(tmp_path / f"cache-{world_size}"))
    assert len(results) == 6
    assert len(results[0][0]) > 1000
    assert all(result[:3] == results[0][:3] for result in results)
    contents = [{path.name: path.read_bytes() for path in Path(result[3]).glob("tokens-*")} for result in results]
    assert len(contents[0]) > 10
    assert all(content == contents[0] for content in contents)


def error_on(ranks: Ranks, path: str, cache: str) -> tuple[str, str]:
    try:
        prepare_on(ranks, path, cache)
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def test_an_error_on_one_rank_is_raised_on_every_rank(tmp_path: Path, texts: Path) -> None:
    bad = texts / "b.txt.gz"
    bad.write_bytes(bad.read_bytes()[:-9])
    expected = f"{bad} is not a valid gzip file: Compressed file ended before the end-of-stream marker was reached"
    results = run_threads(3, error_on, str(texts), str(tmp_path / "cache"))
    assert results == [(UserError.__name__, expected)] * 3
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_path_that_does_not_exist_is_an_error_on_every_rank(tmp_path: Path) -> None:
    results = run_threads(2, error_on, str(tmp_path / "no.txt"), str(tmp_path / "cache"))
    assert {name for name, _ in results} == {"UserError"}
    assert all("no such file or folder" in message for _, message in results)


def error_without_shared_cache_on(ranks: Ranks, path: str, cache: str) -> tuple[str, str]:
    if ranks.rank == 1:  # As on a host that does not share the folder.
        exists = prepare.os.path.exists
        prepare.os.path.exists = lambda path: "cache" not in str(path) and exists(path)
    return error_on(ranks, path, cache)


def test_a_cache_that_the_ranks_do_not_share_is_an_error_on_every_rank(tmp_path: Path, texts: Path) -> None:
    results = run_ranks(2, error_without_shared_cache_on, str(texts), str(tmp_path / "cache"))
    assert {name for name, _ in results} == {"RuntimeError"}
    for _, message in results:
        assert "rank 1 on " in message
        assert f"does not see {tmp_path}/cache" in message
        assert "the cache folder must be on a file system that all ranks share" in message
