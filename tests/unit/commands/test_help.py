"""Every command's help fits a screen, ends with an example that the command understands, and comes at once."""

from __future__ import annotations

import shlex
import subprocess
import sys
from typing import get_args

import click
import pytest

from embedtrain import __version__
from embedtrain.cli import COMMANDS, main, program
from embedtrain.commands.console import Command
from embedtrain.commands.export import FORMAT_NAMES, INDEX, INDEX_KINDS, PACKAGE, SIMILARITIES
from embedtrain.export.formats import FORMATS
from embedtrain.export.index import IndexKind, Similarity
from tests.unit.commands.parsing import parse

MAX_LINES, MAX_COLUMNS = 40, 100
# Torch alone takes seconds, and the packages of data nearly one.
SLOW_MODULES = {"torch", "pyarrow", "scipy", "matplotlib", "tensorboard"}


def command_of(name: str) -> click.Command:
    found = program.get_command(click.Context(program), name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(MAX_COLUMNS))
    assert main([name, "--help"] if name else ["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= MAX_LINES
    assert not [line for line in lines if len(line) > MAX_COLUMNS]


def test_the_list_of_commands_fits_a_narrow_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in COMMANDS)
    assert not [line for line in printed.splitlines() if line.startswith("  ") and line.endswith("...")]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_that_are_understood(name: str) -> None:
    context = click.Context(command_of(name), info_name=name)
    examples = [line.strip() for line in context.get_help().partition("Example:\n")[2].splitlines()]
    assert any(name in example.split() for example in examples)
    for example in examples:
        arguments = shlex.split(example.partition(" > ")[0])
        assert parse(arguments[arguments.index("embedtrain") + 1 :]).command.callback is not None


def test_every_parameter_says_what_it_is() -> None:
    for name in COMMANDS:
        assert command_of(name).get_short_help_str().rstrip(".")
        for param in command_of(name).params:
            assert isinstance(param, click.Argument | click.Option) and param.help, f"{name} {param.name}"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["recommend", "5", "--bad"]])
def test_help_and_mistakes_need_no_slow_imports(words: list[str]) -> None:
    program = f"import sys; from embedtrain.cli import main; main({words}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not SLOW_MODULES & {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"embedtrain {__version__}\n"


def test_the_formats_of_export_are_those_there_are() -> None:
    assert (*FORMATS, INDEX, PACKAGE) == FORMAT_NAMES
    assert (get_args(IndexKind), get_args(Similarity)) == (INDEX_KINDS, SIMILARITIES)


def test_the_help_option_has_both_names_in_every_context() -> None:
    fresh = Command("fresh")
    assert fresh.get_params(click.Context(fresh))[-1].opts == ["-h", "--help"]
