"""A run folder's own files: whatever lies in their place, nothing is written elsewhere and nothing is waited for."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from embedtrain import storage
from embedtrain.errors import UserError
from embedtrain.metrics.sinks import JsonlSink
from embedtrain.train.run_folder import RunFolder

PUTS: list[tuple[Callable[[Path], object], str]] = [
    (Path.mkdir, "is a folder"),
    (os.mkfifo, "is a pipe"),
    (lambda path: path.symlink_to("nowhere"), "is a link to nowhere"),
    (lambda path: path.symlink_to("elsewhere"), "is a link to elsewhere"),
]


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "status.json", "vocabulary.tsv", "status.json.tmp"])
@pytest.mark.parametrize(("put", "fault"), PUTS)
def test_what_is_no_file_is_refused_before_the_run_begins(
    tmp_path: Path, name: str, put: Callable[[Path], object], fault: str
) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    RunFolder(str(tmp_path)).require_writable_names()
    put(tmp_path / name)
    with pytest.raises(UserError, match=f"{name} {fault}, and a run writes a file of that name"):
        RunFolder(str(tmp_path)).require_writable_names()


@pytest.mark.parametrize(("put", "fault"), PUTS[1:])
def test_a_path_that_cannot_be_a_folder_is_refused(tmp_path: Path, put: Callable[[Path], object], fault: str) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    put(tmp_path / "run")
    reason = "which does not exist" if "nowhere" in fault else "not a folder"
    with pytest.raises(UserError, match=f"run {fault}, {reason}; give another path"):
        RunFolder(str(tmp_path / "run")).require_writable_names()


def test_a_configuration_of_the_users_own_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: word2vec\n")
    with pytest.raises(UserError, match=r"config\.yaml exists without any other file of a run.*another run\.path"):
        RunFolder(str(tmp_path)).require_writable_names()
    (tmp_path / "owner-00000001.json").write_text("{}")
    RunFolder(str(tmp_path)).require_writable_names()


def test_a_file_in_the_place_of_a_folder_is_refused_and_a_link_to_a_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "checkpoints").symlink_to("disk")
    RunFolder(str(tmp_path)).require_writable_names()
    (tmp_path / "disk").rmdir()
    with pytest.raises(UserError, match="checkpoints is a link to disk, and a run keeps a folder of that name"):
        RunFolder(str(tmp_path)).require_writable_names()


@pytest.mark.parametrize("name", ["status.json", "config.yaml"])
def test_nothing_is_written_through_a_link_in_the_place_of_a_temporary_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    (tmp_path / f"{name}.tmp").symlink_to("elsewhere")
    folder = RunFolder(str(tmp_path))
    folder.write_config("a: 1\n")
    folder.write_status("done", 0)
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert (tmp_path / name).read_text()


def test_metrics_are_not_appended_through_a_link(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere").write_text("mine")
    sink = JsonlSink(str(tmp_path / "metrics.jsonl"))
    (tmp_path / "metrics.jsonl").symlink_to("elsewhere")
    sink.log({"step": 1})
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert "cannot write metrics" in caplog.text


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_may_never_end_is_not_read(tmp_path: Path, put: Callable[[Path], object]) -> None:
    put(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"config\.yaml is a (folder|pipe|device), not a file"):
        RunFolder(str(tmp_path)).read_config()
    with pytest.raises(FileNotFoundError):
        storage.read(str(tmp_path / "nothing"))


def test_lines_that_hold_no_record_are_left_out_and_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [b'{"step": 1, "loss": 2}', b"[]", b'{"loss": 3}', b'{"step": "x"}', b"\xff", b'{"step": 4, "loss": null}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n" + b"[" * 100_000)
    records = list(RunFolder(str(tmp_path)).read_metrics())
    assert records == [{"step": 1, "loss": 2}, {"step": 4, "loss": None}]
    assert "skipped 5 lines without a record, such as line 2" in caplog.text


@pytest.mark.parametrize("text", ["", "}{", "[]", "[" * 100_000, '"x"'])
def test_a_status_that_is_none_says_nothing(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "status.json").write_text(text)
    assert RunFolder(str(tmp_path)).read_status() == {}


@pytest.mark.parametrize("path", ["a::b", "zip://x::y.zip", "", "/"])
def test_a_path_that_no_run_can_have_is_refused(path: str) -> None:
    with pytest.raises(UserError):
        RunFolder(path)
