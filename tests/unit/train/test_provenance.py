from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from embedtrain.train.provenance import command_line, git_commit, start_facts
from embedtrain.train.run_folder import RunFolder


def git(*words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *words], check=True, capture_output=True)


def test_the_commit_is_that_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_commit() is None
    git("init")
    Path("a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    commit = git_commit()
    assert commit is not None and len(commit) == 40
    Path("a").write_text("2")
    assert git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_commit() is None, "there is no git"


def test_a_command_is_kept_as_it_is_typed_without_passwords() -> None:
    words = ["/x/bin/embedtrain", "train", "my file.yaml", "publish.to=redis://:secret@host/0", "s3://a:secret@b/c"]
    told = command_line(words)
    assert told == "embedtrain train 'my file.yaml' publish.to=redis://@host/0 s3://a@b/c"
    assert command_line(["/x/embedtrain/__main__.py", "train"]) == "embedtrain train"


def test_starts_are_kept_until_the_run_begins_anew(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    assert folder.read_starts() == []
    folder.add_start(start_facts(0, 2), is_new=True)
    folder.add_start({"step": 7}, is_new=False)
    assert [start["step"] for start in folder.read_starts()] == [0, 7]
    (tmp_path / "run" / "starts.jsonl").write_text(json.dumps({"step": 1}) + "\n[1]\nbroken\n")
    assert folder.read_starts() == [{"step": 1}]
    folder.add_start({"step": 0}, is_new=True)
    assert folder.read_starts() == [{"step": 0}]
