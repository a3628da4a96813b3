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
    assert command_line([]) == "''"


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.path=s3://a:key1@b/c,s3://d:key2@e/f", "data.path=s3://a@b/c,s3://d@e/f"),
        ("data.path=[ftp://a:key1@b/c, ftp://d:key2@e/f]", "'data.path=[ftp://a@b/c, ftp://d@e/f]'"),
        ("data={path: s3://a:key@b/c}", "'data={path: s3://a@b/c}'"),
        ("data.path=zip://x::ftp://a:key@b/c.zip", "data.path=zip://x::ftp://a@b/c.zip"),
        ("data.path=https://b/c?sig=key&v=1", "'data.path=https://b/c?v=1'"),
        ("data.path=https://b/c?access_token=key", "data.path=https://b/c"),
        ("log.api_key=key", "'log.api_key=(hidden)'"),
        ("log={token: key, other: 1}", "'log={token: (hidden), other: 1}'"),
        ("log.token=my long key", "'log.token=(hidden)'"),
        ("log.token=null", "log.token=null"),
        ("data.tokenizer=bert", "data.tokenizer=bert"),
        ("data.num_tokens=5", "data.num_tokens=5"),
    ],
)
def test_no_secret_of_a_command_is_kept(word: str, told: str) -> None:
    assert command_line(["embedtrain", "train", word]) == f"embedtrain train {told}"


def test_no_secret_of_an_option_is_kept() -> None:
    words = ["own.py", "--token", "key", "--epochs", "3", "--password=key", "--token", "--words", "x"]
    told = "own.py --token '(hidden)' --epochs 3 '--password=(hidden)' --token --words x"
    assert command_line(words) == told


def test_what_git_complains_of_need_not_be_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "git").write_text("#!/bin/sh\nprintf '\\377' >&2\nexit 128\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert git_commit() is None


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
