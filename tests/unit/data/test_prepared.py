"""Prepared data that are not what was written are set aside and prepared anew, and a line says so."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from embedtrain.data import prepared as prepared_data
from embedtrain.data.baskets import write_baskets
from embedtrain.data.interactions import InteractionOptions, prepare_interactions
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.data.prepared import SEAL_NAME, prepared_entry
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import CheckpointError
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
    words = [corpus.vocabulary.words[token if token >= 0 else ~token] for token in corpus.read(0, corpus.num_tokens)]
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
    path = write_baskets(str(folder / "a.csv"), ("session", "item"), str(folder / "cache"), ONE_PROCESS, format="csv")
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
            assert name in said and "prepared anew" in said
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
        assert "prepared anew" in caplog.text


def test_a_forged_table_of_contents_names_no_file_elsewhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, expected = text(tmp_path)
    meta = json.loads(Path(path, "meta.json").read_text())
    meta["shards"][0]["name"] = "../../x"
    Path(path, "meta.json").write_text(json.dumps(meta))
    seal = {name: vars(prepared_data._sealed(path, name)) for name in os.listdir(path) if name != SEAL_NAME}
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
    assert "anew" not in caplog.text


def wait_for_verification() -> None:
    for thread in threading.enumerate():
        if thread.name == "embedtrain-prepared-data":
            thread.join()


def test_what_changed_without_a_trace_is_found_while_the_run_goes_on(tmp_path: Path) -> None:
    def prepare(work_path: str) -> None:
        Path(work_path, "x.bin").write_bytes(b"abc")

    def again() -> prepared_data.Check:
        return prepared_entry(str(tmp_path), "e", lambda path: path, prepare, ONE_PROCESS)[1]

    again()
    again()()
    wait_for_verification()
    before = os.stat(tmp_path / "e" / "x.bin")
    (tmp_path / "e" / "x.bin").write_bytes(b"abd")
    os.utime(tmp_path / "e" / "x.bin", ns=(before.st_atime_ns, before.st_mtime_ns))
    check = again()
    wait_for_verification()
    with pytest.raises(CheckpointError, match=r"x\.bin does not hold what was written.*start again"):
        check()
    again()
    assert (tmp_path / "e" / "x.bin").read_bytes() == b"abc"
