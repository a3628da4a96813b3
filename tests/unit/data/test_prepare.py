from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import time
import uuid
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from embedtrain.data import prepare
from embedtrain.data import prepared as prepared_data
from embedtrain.data.corpus import PreparedCorpus
from embedtrain.data.prepare import CorpusOptions, plan_parts, prepare_corpus
from embedtrain.data.sources import Source
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError

WIKI = Path(__file__).parents[4] / "shared" / "data" / "text-en-wiki" / "wiki_a.txt"
CONTENT = "The cat sat.\nA dog, a cat!\n\nÉté: the dog\n" * 40


def prepared(cache: Path, path: str | list[str], min_count: int = 1, **options: object) -> PreparedCorpus:
    given = CorpusOptions(path=path, min_count=min_count, **options)  # type: ignore[arg-type]
    return prepare_corpus(given, str(cache), ONE_PROCESS)


def decoded(corpus: PreparedCorpus) -> list[list[str]]:
    sentences: list[list[str]] = []
    for token in corpus.read(np.array([0]), np.array([corpus.num_tokens])).tolist():
        if token < 0:
            sentences.append([])
        sentences[-1].append(corpus.vocabulary.words[~token if token < 0 else token])
    return sentences


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text(CONTENT, encoding="utf-8")
    return path


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_decodes_to_the_words_of_the_text(text: Path, cache: Path) -> None:
    corpus = prepared(cache, str(text))
    expected = [["the", "cat", "sat"], ["a", "dog", "a", "cat"], ["été", "the", "dog"]] * 40
    assert decoded(corpus) == expected
    assert corpus.num_sentences == len(expected)
    counts = Counter(word for sentence in expected for word in sentence)
    assert dict(zip(corpus.vocabulary.words, corpus.vocabulary.counts.tolist(), strict=True)) == counts


def test_options_choose_the_words(text: Path, cache: Path) -> None:
    assert prepared(cache, str(text), tokenizer="whitespace").vocabulary.row_of("cat!") is not None
    assert prepared(cache, str(text), max_vocab_size=2).vocabulary.words == ["a", "cat"]
    frequent = [["the", "cat"], ["a", "dog", "a", "cat"], ["the", "dog"]]
    assert decoded(prepared(cache, str(text), min_count=41)) == frequent * 40


def test_parts_and_chunks_do_not_change_the_tokens(text: Path, cache: Path) -> None:
    whole = prepared(cache, str(text))
    options = CorpusOptions(path=str(text), min_count=1)
    for number, (part_bytes, chunk_bytes) in enumerate([(7, 1000), (100, 5), (1000, 64)]):
        corpus = prepare_corpus(
            options, str(cache / str(number)), ONE_PROCESS, part_bytes=part_bytes, chunk_bytes=chunk_bytes
        )
        assert decoded(corpus) == decoded(whole)
        assert corpus.vocabulary.fingerprint == whole.vocabulary.fingerprint


def test_plain_and_compressed_files_on_several_file_systems(tmp_path: Path, cache: Path) -> None:
    lines = ["one two\n", "three one\n", "last line\n"]
    memory = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe(f"{memory}/a.txt", lines[0].encode().rstrip())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(lines[1].encode().rstrip()))
    (tmp_path / "c.txt.zst").write_bytes(pa.compress(lines[2].encode(), "zstd", asbytes=True))
    (tmp_path / "d.txt").touch()
    corpus = prepared(cache, [memory, str(tmp_path / "*.txt*")])
    assert decoded(corpus) == [["one", "two"], ["three", "one"], ["last", "line"]]


def test_the_cache_is_reused_without_reading_the_sources(
    text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(cache, str(text))
    monkeypatch.setattr(prepare, "read_chunks", None)
    again = prepared(cache, str(text))
    assert (again.path, again.fingerprint) == (first.path, first.fingerprint)
    assert os.listdir(cache) == [os.path.basename(first.path)]


def test_a_changed_input_or_option_makes_a_new_entry(text: Path, cache: Path) -> None:
    first = prepared(cache, str(text))
    other_options = prepared(cache, str(text), min_count=41)
    text.write_text(CONTENT + "new\n", encoding="utf-8")
    changed = prepared(cache, str(text))
    assert len({corpus.path for corpus in (first, other_options, changed)}) == 3
    assert len({corpus.fingerprint for corpus in (first, other_options, changed)}) == 3
    assert changed.vocabulary.row_of("new") is not None


def test_the_fingerprint_is_of_the_content(text: Path, cache: Path) -> None:
    copy = text.with_name("copy.txt")
    copy.write_bytes(text.read_bytes())
    first, second = prepared(cache, str(text)), prepared(cache, str(copy))
    assert first.path != second.path
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize("stage", ["_count_words", "_build_vocabulary", "_write_shards", "_write_contents"])
def test_a_preparation_that_was_killed_is_done_again(
    text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    with monkeypatch.context() as patch:

        def die(*args: object) -> None:
            raise SystemExit(9)

        patch.setattr(prepare, stage, die)
        # A killed process tidies nothing.
        patch.setattr(prepared_data.shutil, "rmtree", lambda *args, **kwargs: None)
        with pytest.raises(SystemExit):
            prepared(cache, str(text))
    (leftover,) = os.listdir(cache)
    corpus = prepared(cache, str(text))
    assert len(decoded(corpus)) == 120
    assert set(os.listdir(cache)) == {leftover, os.path.basename(corpus.path)}


def test_an_entry_without_its_table_of_contents_is_done_again(text: Path, cache: Path) -> None:
    corpus = prepared(cache, str(text))
    os.remove(os.path.join(corpus.path, "meta.json"))
    assert prepared(cache, str(text)).fingerprint == corpus.fingerprint


def test_a_failed_preparation_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\n\xff")
    with pytest.raises(UserError, match="not UTF-8 text: 0xff at byte 2"):
        prepared(cache, str(tmp_path / "a.txt"))
    assert os.listdir(cache) == []


def test_old_leftovers_are_removed(text: Path, cache: Path) -> None:
    entry = prepared(cache, str(text)).path
    shutil.rmtree(entry)
    for name, age_seconds in (("old", 2 * 24 * 3600), ("new", 60)):
        os.mkdir(f"{entry}.{name}.tmp")
        os.utime(f"{entry}.{name}.tmp", (time.time() - age_seconds,) * 2)
    prepared(cache, str(text))
    assert sorted(os.listdir(cache)) == sorted(os.path.basename(p) for p in (entry, f"{entry}.new.tmp"))


def test_of_two_jobs_the_first_to_finish_counts(text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = prepared_data._commit

    def overtaken(*args: object) -> None:
        monkeypatch.setattr(prepared_data, "_commit", commit)
        prepared(cache, str(text))
        commit(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(prepared_data, "_commit", overtaken)
    corpus = prepared(cache, str(text))
    assert len(decoded(corpus)) == 120
    assert os.listdir(cache) == [os.path.basename(corpus.path)]


def test_progress_goes_to_the_end_of_each_stage(text: Path, cache: Path) -> None:
    told: list[tuple[str, float]] = []
    options = CorpusOptions(path=str(text), min_count=1)
    prepare_corpus(options, str(cache), ONE_PROCESS, on_progress=lambda *p: told.append(p), chunk_bytes=100)
    stages = list(dict.fromkeys(stage for stage, _ in told))
    assert stages == ["count words", "encode words"]
    for stage in stages:
        fractions = [fraction for name, fraction in told if name == stage]
        assert fractions == sorted(fractions)
        assert len(fractions) > 2
        assert fractions[-1] == 1.0


def test_the_table_of_contents_says_what_was_prepared(text: Path, cache: Path) -> None:
    corpus = prepared(cache, str(text))
    meta = json.loads((Path(corpus.path) / "meta.json").read_text())
    options = {"path": str(text), "tokenizer": "letters", "min_count": 1, "max_vocab_size": None}
    options |= {"base_vocabulary": None, "takes_new": True}
    assert meta["options"] == options
    assert sum(shard["num_tokens"] for shard in meta["shards"]) == corpus.num_tokens
    assert str(text) in meta["sources"][0]


def test_plan_covers_the_sources_in_order() -> None:
    sizes = {"a.txt": 25, "b.gz": 30, "c.txt": 0, "d.txt": 4}
    sources = [Source(url, size, "", "gzip" if url == "b.gz" else None) for url, size in sizes.items()]
    plan = [[(s.source.url, s.start, s.stop) for s in part] for part in plan_parts(sources, 10)]
    assert plan == [
        [("a.txt", 0, 10)],
        [("a.txt", 10, 20)],
        [("a.txt", 20, 25), ("b.gz", 0, 30)],
        [("d.txt", 0, 4)],
    ]
    assert len(plan_parts([Source("big.txt", 10**12, "")], 10)) == 256
    assert len(plan_parts([Source(f"{n}.txt", 100, "") for n in range(100_000)], 10)) <= 256
    assert plan_parts([], 10) == []


def test_an_empty_vocabulary_names_the_text(text: Path, cache: Path) -> None:
    with pytest.raises(UserError) as error:
        prepared(cache, str(text), min_count=1000)
    assert str(error.value) == (
        f"{text}: the vocabulary is empty: 6 distinct words were seen, the most frequent ('a') 80 times, and "
        "min_count is 1000"
    )
    text.write_text("\n12 - 34\n")
    with pytest.raises(UserError) as error:
        prepared(cache, str(text))
    assert str(error.value).startswith(f"{text}: the vocabulary is empty: the text holds no words of letters; ")
    text.write_text("")
    with pytest.raises(UserError, match="the text holds no words"):
        prepared(cache, str(text))


def test_a_cache_folder_that_cannot_be_used_is_refused(text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        prepare_corpus(CorpusOptions(path=str(text)), "memory://cache", ONE_PROCESS)
    assert str(error.value) == (
        "cache path memory://cache: expected a local folder, whose files can be memory-mapped, got one on memory"
    )
    with pytest.raises(UserError, match=f"cache path {text}/x: cannot create the folder: .*Not a directory"):
        prepare_corpus(CorpusOptions(path=str(text)), f"{text}/x", ONE_PROCESS)


@pytest.mark.parametrize(
    ("function", "message"), [("mkdir", "permission denied"), ("makedirs", "cannot create the folder")]
)
def test_a_cache_folder_without_permission_is_refused(
    text: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, function: str, message: str
) -> None:
    def refuse(path: str, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", path)

    cache.mkdir()
    monkeypatch.setattr(prepare.os, function, refuse)  # A file mode does not stop root.
    with pytest.raises(UserError, match=f"cache path {cache}: {message}: .*Permission denied"):
        prepared(cache, str(text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "words"}, "tokenizer: expected one of letters, whitespace, got 'words'"),
        ({"min_count": 0}, "min_count: expected at least 1, got 0"),
        ({"max_vocab_size": 0}, "max_vocab_size: expected at least 1, or null for all, got 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        CorpusOptions(path="a.txt", **options)  # type: ignore[arg-type]
    assert str(error.value) == message


@pytest.mark.skipif(not WIKI.exists(), reason=f"{WIKI} is absent")
def test_real_text(tmp_path: Path, cache: Path) -> None:
    content = WIKI.read_bytes()[: 3 << 20].rpartition(b"\n")[0]
    (tmp_path / "wiki.txt").write_bytes(content)
    corpus = prepared(cache, str(tmp_path / "wiki.txt"), min_count=5)
    sentences = [re.findall(r"[^\W\d_]+", line) for line in content.decode().lower().split("\n")]
    counts = Counter(word for sentence in sentences for word in sentence)
    kept = {word for word, count in counts.items() if count >= 5}
    # `re` counts superscript digits as letters, and parts a word at an accent of its own: both are rare.
    assert len(kept ^ set(corpus.vocabulary.words)) < 0.001 * len(kept)
    expected = sum(word in kept for sentence in sentences for word in sentence)
    assert corpus.num_tokens == pytest.approx(expected, rel=1e-4)


def test_a_text_without_any_word_of_the_vocabulary_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "base.tsv").write_text("known\t5\n")
    (tmp_path / "new.txt").write_text("neue kleine welt\n")
    with pytest.raises(UserError, match=r"new\.txt: none of its words is in the vocabulary.*data\.min_count=5 times"):
        prepared(cache, str(tmp_path / "new.txt"), min_count=5, base_vocabulary=str(tmp_path / "base.tsv"))
    assert not [path for path in cache.iterdir() if path.name.startswith("corpus-")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node_1 node_2\nnode_2 node_3\n", "100% of its first words are like 'node_1'"),
        ("u17 bought i4 and i9\n", "60% of its first words are like 'u17'"),
        ("In 1984, the 2nd edition (1st: 1949) of a well-known book was e-mailed to us.\n", ""),
    ],
)
def test_words_that_letters_would_lose_are_told_with_the_setting_that_keeps_them(
    text: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "walks.txt").write_text(text * 50)
    for tokenizer in ("letters", "whitespace"):
        caplog.clear()
        options = CorpusOptions(path=str(tmp_path / "walks.txt"), tokenizer=tokenizer, min_count=1)
        prepare_corpus(options, str(tmp_path / "cache"), ONE_PROCESS)
        is_told = "data.tokenizer=whitespace keeps them as they are" in caplog.text
        assert is_told == (bool(said) and tokenizer == "letters")
        assert not is_told or said in caplog.text


def test_walks_of_numbers_hold_no_words_of_letters(tmp_path: Path) -> None:
    (tmp_path / "walks.txt").write_text("12 7 9\n7 9 12\n")
    options = CorpusOptions(path=str(tmp_path / "walks.txt"), min_count=1)
    with pytest.raises(UserError, match=r"holds no words of letters; data\.tokenizer=whitespace takes"):
        prepare_corpus(options, str(tmp_path / "cache"), ONE_PROCESS)


def test_a_word_as_long_as_a_page_is_told(tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("short words\n" * 9 + "long\u0300" + "x" * 20_000, encoding="utf-8")
    assert "xxx" in prepared(cache, str(tmp_path / "a.txt"), tokenizer="whitespace").vocabulary.words[-1]
    assert "1 word of over 10,000 bytes; the longest has 20,006 and begins with long\u0300xxx" in caplog.text
