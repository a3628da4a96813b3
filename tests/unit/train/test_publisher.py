"""A run starts publications beside its steps, and none at a time when another is under way."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from embedtrain import cli
from embedtrain.config.sections import PublishConfig
from embedtrain.serve.published import FORMAT, VERSION
from embedtrain.train.publisher import Publisher

AGAIN = "embedtrain publish runs/x --to out publishes the last checkpoint"
PROGRAM = """#!/bin/sh
# The result is decided before the line is written, because the test then removes or creates `fail`.
[ -e {folder}/fail ] && fail=yes
echo "$RANK$MASTER_ADDR$TORCHELASTIC_ERROR_FILE $@" >> {folder}/said
while [ -e {folder}/wait ]; do sleep 0.01; done
[ "$fail" ] && {{ echo "Traceback"; echo "embedtrain: failed: no" >&2; exit 1; }}
echo "runs/x: using the newest checkpoint, step 3" >&2
echo "$6: version 7"
echo "  word: 3 rows added, 0 changed, 0 deleted"
[ -e {folder}/fewer ] && echo "  country: gone, 21 rows"
true
"""


def until(happened: Callable[[], object]) -> None:
    last = time.monotonic() + 20
    while not happened():
        assert time.monotonic() < last
        time.sleep(0.005)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a program stands for Python."""
    program = tmp_path / "python"
    program.write_text(PROGRAM.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    for name in ("RANK", "MASTER_ADDR", "TORCHELASTIC_ERROR_FILE"):
        monkeypatch.setenv(name, "of a rank")
    return tmp_path


def said(folder: Path, num_lines: int) -> list[str]:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        lines = (folder / "said").read_text().splitlines() if (folder / "said").exists() else []
        if len(lines) >= num_lines:
            return lines
        time.sleep(0.005)
    raise AssertionError("no publication was started")


def test_publications_follow_each_other(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, num_started, start = 0.0, 0, Publisher._start

    def counted(publisher: Publisher) -> None:
        nonlocal num_started
        num_started += 1
        start(publisher)

    monkeypatch.setattr("embedtrain.train.publisher.time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Publisher, "_start", counted)
    caplog.set_level(logging.INFO, logger="embedtrain")
    (folder / "wait").touch()
    complete: list[int | None] = [None]
    publisher = Publisher("runs/x", PublishConfig("out", every_seconds=50), lambda: complete[-1])
    complete.append(1)
    publisher.step()
    assert num_started == 0, "it is not time yet"
    complete.append(None)
    now += 60
    publisher.step()
    assert num_started == 0, "there is no checkpoint"
    complete.append(1)
    publisher.step()
    assert num_started == 1
    complete.append(2)
    now += 60
    publisher.step()
    assert num_started == 1, "one is under way"
    (folder / "wait").unlink()
    until(lambda: publisher.step() or bool(caplog.messages))
    assert num_started == 2
    assert caplog.messages == ["published: out: version 7"]
    until(lambda: publisher.step() or len(caplog.messages) == 2)
    now += 60
    publisher.step()
    assert num_started == 2, "there is no newer checkpoint"
    (folder / "fail").touch()
    publisher.finish()
    assert num_started == 3
    assert caplog.messages[1:] == [
        "published: out: version 7",
        f"not published to out, {AGAIN}: embedtrain: failed: no",
    ]
    now += 60
    publisher.step()
    assert num_started == 4, "what failed is tried again"
    assert said(folder, 4) == [" -m embedtrain publish runs/x --to out"] * 4, "without the variables of a rank"
    (folder / "fail").unlink()
    (folder / "fewer").touch()
    publisher.finish()
    assert num_started == 5
    assert caplog.messages[-2:] == [
        "not published to out, the last checkpoint follows: embedtrain: failed: no",
        "published: out: version 7; country: gone, 21 rows",
    ]


def test_a_publication_that_takes_too_long_is_ended(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "wait").touch()
    publisher = Publisher("runs/x", PublishConfig("ftp://me:you@h/a", 0.01, timeout_seconds=0.3), lambda: 1)
    time.sleep(0.02)
    publisher.step()
    until(lambda: publisher.step() or bool(caplog.messages))
    publisher.finish()
    wrong = "it took longer than publish.timeout_seconds=0.3, and was ended"
    again = AGAIN.replace("out", "ftp://me@h/a")
    assert {"training continues", again} <= {message.split(": ")[0].partition(", ")[2] for message in caplog.messages}
    assert all(message.endswith(wrong) for message in caplog.messages)


@pytest.mark.parametrize(
    ("command", "settings", "expected"),
    [
        ("train", ["publish.to=kafka://x"], "'kafka://x' is not a path that can be opened"),
        (
            "train",
            ["publish.to=redis://127.0.0.1:1"],
            "cannot publish to redis://127.0.0.1:1: cannot use Redis at",
        ),
        ("train", ["publish.to=other"], "other holds 'notes.txt' but no publication"),
        ("train", ["publish.to=corpus.txt"], "corpus.txt is a file, not a folder"),
        ("train", ["publish.to=memory://x"], "memory://x is in the memory of this process"),
        ("train", ["publish.to=redis://h/db?prefix=x"], "the database must be a number"),
        (
            "train",
            ["publish.to=ranked"],
            "ranked holds a ranking model of runs/r, but this run is a word2vec model",
        ),
        (
            "train",
            ["publish.to=redis://:secret@host"],
            "publish.to=redis://@host contains a password, which config.yaml, checkpoints and trackers would "
            "store: remove it and set the environment variable EMBEDTRAIN_REDIS_PASSWORD",
        ),
        ("train", ["publish.to=ftp://me:secret@host/a"], "environment variable FSSPEC_FTP_PASSWORD"),
        ("train", ["publish.to=out", "publish.timeout_seconds=0"], "publish.timeout_seconds must be more than 0"),
        ("train", ["publish.to=out", "publish.every_seconds=0"], "publish.every_seconds must be more than 0"),
        (
            "compare",
            ["--optimizers", "adam,sgd", "publish.to=out"],
            "compare trains many runs, so publish.to cannot be set",
        ),
    ],
)
def test_a_place_is_checked_before_the_run(
    command: str,
    settings: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    (tmp_path / "corpus.txt").write_text("a b a b")
    (tmp_path / "ranked").mkdir()
    facts = {"format": FORMAT, "format_version": VERSION, "run": "runs/r", "model": "ranking"}
    (tmp_path / "ranked/version-000000001.json").write_text(json.dumps(facts))
    own = ["--output", f"{tmp_path}/run"] if command == "compare" else [f"run.path={tmp_path}/run"]
    assert cli.main([command, "word2vec", f"data.path={tmp_path}/corpus.txt", *own, *settings]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
