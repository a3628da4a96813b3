"""What comes from data, paths and files gives no commands to the terminal that it is shown on."""

from __future__ import annotations

import ast
import logging
from pathlib import Path

import pytest
import torch

import embedtrain
from embedtrain.cli import main
from embedtrain.commands.console import PlainFormatter
from embedtrain.distributed.launcher import tell_launcher
from embedtrain.errors import printable
from tests.unit.commands.test_diff import save

ESCAPE = "\x1b[2J"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b\u00a0\u00e9\u65e5", "a b\u00a0\u00e9\u65e5"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x9b2J\x85", "\\x9b2J\\x85"),
        ("\u2028\u202ecod", "\\u2028\\u202ecod"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_only_what_a_terminal_obeys_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert printable("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_words_and_paths_are_shown_escaped_by_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / f"run{ESCAPE}"
    run.mkdir()
    save(run, {"word": torch.eye(3)}, words=["king", f"que{ESCAPE}en", "man\u202e"])
    save(tmp_path / "other", {"word": torch.ones(3, 3)}, words=["king", f"que{ESCAPE}en", "man\u202e"])
    Path("a\nb").write_text("k\tq\tx\nking\n")
    Path("config.yaml").write_text("data: {path: x}\n")
    commands = [
        ["neighbors", str(run), "king"],
        ["neighbors", str(run), f"kin{ESCAPE}"],
        ["diff", str(run), "other"],
        ["export", str(run), "--format", "npy", "--output", f"out{ESCAPE}"],
        ["evaluate", str(run), "--similarity", "a\nb"],
        ["inspect", f"nowhere{ESCAPE}"],
        ["train", "config.yaml", f"data.path=nowhere{ESCAPE}"],
        ["train", f"config{ESCAPE}.yaml"],
        ["config", "show", "config.yaml", f"data.path=x{ESCAPE}"],
        [f"comm{ESCAPE}"],
    ]
    for command in commands:
        main(command)
        said = "".join(capfd.readouterr())
        assert "\\x1b" in said or "a\\nb" in said or "\\e[2J" in said, command
        assert "\x1b" not in said and "\u202e" not in said, command
    assert Path(f"out{ESCAPE}.vocabulary.tsv").read_text().splitlines()[1] == f"que{ESCAPE}en\t8"


def test_log_records_and_what_torchrun_prints_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "left out %s", (f"a{ESCAPE}",), None)
    assert PlainFormatter("%(message)s").format(record) == "left out a\\x1b[2J"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    tell_launcher(f"a{ESCAPE}")
    assert r"a\\x1b[2J" in (tmp_path / "error.json").read_text()


def test_commands_print_by_the_console_alone() -> None:
    folder = Path(embedtrain.__file__).parent / "commands"
    for path in sorted(folder.glob("*.py")):
        if path.name not in ("console.py", "completion.py"):
            names = [node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)]
            assert "print" not in names, path.name
