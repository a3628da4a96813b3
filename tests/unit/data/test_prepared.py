"""Prepared data that are not what was written are set aside and prepared anew, and a line says so."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from embedtrain.data import prepared as prepared_data
from embedtrain.data import seal as seal_module
from embedtrain.data.baskets import write_baskets
from embedtrain.data.interactions import InteractionOptions, prepare_interactions
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.data.prepared import prepared_entry
from embedtrain.data.seal import SEAL_NAME, Unverified, Verification, seal_file
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import CheckpointError, UserError
from embedtrain.testing.threads import outcomes_on_threads, run_threads
from embedtrain.train.run import begin_verification
from tests.unit.data import click_example

Prepare = Callable[[Path], tuple[str, str]]
"""Prepares data in a folder; returns the path of the entry, and a text that depends on all of its contents."""


def write_once(path: Path, content: str) -> None:
    """Writes a source; one that is written again counts as another."""
    if not path.exists():
        path.write_text(content)


def text(folder: Path) -> tuple[str, str]:
    write_once(folder / "a.txt", "a b c a b\nb c d\n" * 30)
    corpus = prepare_corpus(CorpusOptions(path=str(folder / "a.txt"), min_count=1), str(folder / "cache"), ONE_PROCESS)
    tokens = corpus.read(np.array([0]), np.array([corpus.num_tokens]))
    words = [corpus.vocabulary.words[max(token, ~token)] for token in tokens]
    return corpus.path, corpus.fingerprint + " ".join(words)


def interactions(folder: Path) -> tuple[str, str]:
    write_once(folder / "a.txt", "u1 a b c\nu2 b\nu3 b c\n")
    found = prepare_interactions(InteractionOptions(path=str(folder / "a.txt")), str(folder / "cache"), ONE_PROCESS)
    return found.path, f"{found.fingerprint} {found.known.values.tolist()} {found.users.words} {found.items.words}"


def clicks(folder: Path) -> tuple[str, str]:
    if not (folder / "a.tsv").exists():
        click_example.write_criteo(folder / "a.tsv", 5)
    log = click_example.prepared(folder / "a.tsv", click_example.criteo_schema(None), folder / "cache")
    return log.path, log.fingerprint + repr(log.read(0, log.num_examples).examples.tolist())


def baskets(folder: Path) -> tuple[str, str]:
    write_once(folder / "a.csv", "session,item\n1,a\n1,b\n2,c\n")
    found = write_baskets(str(folder / "a.csv"), ("session", "item"), str(folder / "cache"), ONE_PROCESS, format="csv")
    path = found.text_path
    return os.path.dirname(path), Path(path).read_text()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def overwrite(file: Path) -> None:
    file.write_bytes(b"\xff" * file.stat().st_size)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def rubbish(file: Path) -> None:
    file.write_text("}{")


def a_list(file: Path) -> None:
    file.write_text("[]")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


DAMAGES = [Path.unlink, cut, overwrite, empty, rubbish, a_list, a_folder, a_pipe, a_dangling_link]


@pytest.mark.parametrize("prepare", [text, interactions, clicks, baskets])
def test_an_entry_of_which_any_file_is_damaged_is_prepared_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prepare: Prepare
) -> None:
    path, expected = prepare(tmp_path)
    # One file of each kind: a click log has as many vocabularies as columns.
    files = {re.sub(r"\d+", "", name): name for name in sorted(os.listdir(path))}
    assert SEAL_NAME in files
    for name in files.values():
        for damage in DAMAGES:
            if os.path.getsize(os.path.join(path, name)) == 0 and damage in (cut, overwrite, empty):
                continue
            caplog.clear()
            damage(Path(path, name))
            assert prepare(tmp_path) == (path, expected), (name, damage)
            (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
            assert name in said and "prepared again" in said
            for aside in Path(path).parent.glob("*.damaged"):
                shutil.rmtree(aside)
            assert [each.name for each in Path(path).parent.iterdir()] == [os.path.basename(path)]


@pytest.mark.parametrize("prepare", [text, interactions, clicks, baskets])
def test_whatever_lies_in_the_place_of_an_entry_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, prepare: Prepare
) -> None:
    path, expected = prepare(tmp_path)
    places: list[Callable[[], object]] = [
        lambda: Path(path).write_text("x"),
        lambda: os.symlink("nowhere", path),
        lambda: os.mkdir(path),
        lambda: os.mkfifo(path),
    ]
    for put in places:
        caplog.clear()
        shutil.rmtree(path)
        put()
        assert prepare(tmp_path) == (path, expected)
        assert "prepared again" in caplog.text


def test_a_forged_table_of_contents_names_no_file_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, expected = text(tmp_path)
    meta = json.loads(Path(path, "meta.json").read_text())
    meta["shards"][0]["name"] = "../../x"
    Path(path, "meta.json").write_text(json.dumps(meta))
    seal = {name: vars(seal_file(path, name)) for name in os.listdir(path) if name != SEAL_NAME}
    Path(path, SEAL_NAME).write_text(json.dumps({"files": seal}))
    assert text(tmp_path) == (path, expected)
    assert "shards[0].name: expected string should match pattern" in caplog.text


def test_a_copied_entry_is_read_once_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, expected = text(tmp_path)
    for name in os.listdir(path):
        os.utime(os.path.join(path, name))
    assert text(tmp_path) == (path, expected)
    seal = json.loads(Path(path, SEAL_NAME).read_text())["files"]
    assert all(entry["mtime_ns"] == os.stat(os.path.join(path, name)).st_mtime_ns for name, entry in seal.items())
    assert "prepared again" not in caplog.text


def prepare_letters(work_path: str) -> None:
    for letter in "abcd":
        Path(work_path, f"{letter}.bin").write_bytes(letter.encode() * 3)


def of_letters(cache: Path, ranks: Ranks = ONE_PROCESS) -> Unverified:
    """Prepares an entry "e" of four files, or finds it; returns what of it is not verified."""
    return prepared_entry(str(cache), "e", lambda path, unverified: unverified, prepare_letters, ranks)


def damage_without_a_trace(file: Path) -> None:
    before = os.stat(file)
    file.write_bytes(b"?" * before.st_size)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_what_changed_without_a_trace_is_found_while_the_run_goes_on(tmp_path: Path) -> None:
    assert of_letters(tmp_path) == ()
    Verification(of_letters(tmp_path), 60.0).require_sound(is_last=True)
    damage_without_a_trace(tmp_path / "e" / "a.bin")
    verification = Verification(of_letters(tmp_path), 60.0)
    with pytest.raises(CheckpointError, match=r"a\.bin is damaged: its checksum differs.*start again"):
        verification.require_sound(is_last=True)
    assert of_letters(tmp_path) == ()
    assert (tmp_path / "e" / "a.bin").read_bytes() == b"aaa"


def test_a_run_that_ends_first_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    of_letters(tmp_path)
    goes_on = threading.Event()
    monkeypatch.setattr(seal_module, "compare", lambda *_: goes_on.wait(60))
    verification = Verification(of_letters(tmp_path), 0.01)
    verification.require_sound(is_last=False)
    assert not caplog.records
    for _ in range(2):
        verification.require_sound(is_last=True)
    goes_on.set()
    assert [record.message for record in caplog.records if "not all of its prepared data" in record.message] == [
        caplog.records[-1].message
    ]


def test_a_disk_that_fails_while_data_are_compared_condemns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    of_letters(tmp_path)
    monkeypatch.setattr(seal_module, "compare", raise_of_the_machine)
    Verification(of_letters(tmp_path), 60.0).require_sound(is_last=True)
    assert "too many open files" in caplog.text
    assert (tmp_path / "e" / SEAL_NAME).exists()


def raise_of_the_machine(*_: object) -> None:
    raise OSError(errno.EMFILE, "too many open files")


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_an_entry_is_not_set_aside_for_what_the_machine_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    of_letters(tmp_path)

    def fail(path: str) -> None:
        raise OSError(number, "not the entry's fault")

    monkeypatch.setattr(prepared_data, "read_seal", fail)
    with pytest.raises(OSError, match="not the entry's fault"):
        of_letters(tmp_path)
    assert os.listdir(tmp_path) == ["e"]


def test_an_entry_that_may_not_be_read_is_left_and_the_user_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_letters(tmp_path)

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, "permission denied")

    monkeypatch.setattr(prepared_data, "read_seal", refuse)
    with pytest.raises(UserError, match=r"cannot read the prepared data in .*: .*permission denied"):
        of_letters(tmp_path)
    assert os.listdir(tmp_path) == ["e"]


def test_what_was_set_aside_is_removed_after_a_day(tmp_path: Path) -> None:
    of_letters(tmp_path)
    cut(tmp_path / "e" / "a.bin")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(tmp_path / "e", (two_days_ago, two_days_ago))
    of_letters(tmp_path)
    of_letters(tmp_path)
    (aside,) = tmp_path.glob("e.*.damaged")  # Since now, whenever the entry was made.
    os.utime(aside, (two_days_ago, two_days_ago))
    of_letters(tmp_path)
    assert os.listdir(tmp_path) == ["e"]


def test_no_copy_is_kept_of_an_entry_without_a_seal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of_letters(tmp_path)
    os.remove(tmp_path / "e" / SEAL_NAME)
    of_letters(tmp_path)
    assert os.listdir(tmp_path) == ["e"]
    assert f"has no {SEAL_NAME}: the prepared data are deleted and prepared again" in caplog.text


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """The ident of the thread and the name of the file of each checksum that is computed."""
    found: list[tuple[int, str]] = []
    checksum = seal_module._checksum

    def count(path: str) -> str:
        found.append((threading.get_ident(), os.path.basename(path)))
        return checksum(path)

    monkeypatch.setattr(seal_module, "_checksum", count)
    return found


def test_each_rank_reads_its_share_of_what_is_sealed_or_was_copied(
    tmp_path: Path, reads: list[tuple[int, str]]
) -> None:
    def job(ranks: Ranks) -> Unverified:
        return of_letters(tmp_path, ranks)

    seals = []
    for num_unverified in (0, 1):
        assert [len(unverified) for unverified in run_threads(2, job)] == [num_unverified] * 2
        by_thread: dict[int, list[str]] = {}
        for ident, name in reads:
            by_thread.setdefault(ident, []).append(name)
        assert sorted(by_thread.values()) == [["a.bin", "c.bin"], ["b.bin", "d.bin"]]
        reads.clear()
        for name in os.listdir(tmp_path / "e"):
            os.utime(tmp_path / "e" / name)
        seals.append(json.loads((tmp_path / "e" / SEAL_NAME).read_text())["files"])
    assert [file["xxh3"] for file in seals[0].values()] == [file["xxh3"] for file in seals[1].values()]


def test_a_copied_file_that_another_rank_finds_damaged_is_prepared_anew_by_all(tmp_path: Path) -> None:
    of_letters(tmp_path)
    (tmp_path / "e" / "b.bin").write_bytes(b"???")
    assert run_threads(2, lambda ranks: of_letters(tmp_path, ranks)) == [(), ()]
    assert (tmp_path / "e" / "b.bin").read_bytes() == b"bbb"


def test_all_ranks_know_what_is_not_verified(tmp_path: Path) -> None:
    of_letters(tmp_path)
    first, second = run_threads(2, lambda ranks: of_letters(tmp_path, ranks))
    assert first == second
    assert [entry.path for entry in first] == [str(tmp_path / "e")]


def test_all_ranks_fail_together_if_one_can_start_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_letters(tmp_path)
    unverified = of_letters(tmp_path)
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "embedtrain-prepared-data":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    own, told = outcomes_on_threads(2, lambda ranks: begin_verification(unverified, 60.0, ranks))
    assert "can't start new thread" in str(own)
    assert "rank 0 failed" in str(told)


def test_finding_an_entry_starts_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_letters(tmp_path)

    def fail(thread: threading.Thread) -> None:
        raise AssertionError(f"thread {thread.name} is started")

    monkeypatch.setattr(threading.Thread, "start", fail)
    assert len(of_letters(tmp_path)) == 1


def test_a_text_of_baskets_is_verified_with_the_baskets_it_was_made_of(tmp_path: Path) -> None:
    path, _ = baskets(tmp_path)
    found = write_baskets(
        str(tmp_path / "a.csv"), ("session", "item"), str(tmp_path / "cache"), ONE_PROCESS, format="csv"
    )
    options = CorpusOptions(path=found.text_path, min_count=1)
    for num_entries in (1, 2):
        corpus = prepare_corpus(options, str(tmp_path / "cache"), ONE_PROCESS, unverified_sources=found.unverified)
        paths = [entry.path for entry in corpus.unverified]
        assert paths == [path, corpus.path][:num_entries]
