"""Every command's help fits a screen and ends with an example that the command understands."""

from __future__ import annotations

import argparse
import shlex

import pytest

from embedtrain.cli import build_parser

MAX_LINES, MAX_COLUMNS = 40, 100


def commands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (each for each in build_parser()._actions if isinstance(each, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("name", ["", *commands()])
def test_help_fits_a_screen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(MAX_COLUMNS))
    lines = (commands()[name] if name else build_parser()).format_help().splitlines()
    assert len(lines) <= MAX_LINES
    assert not [line for line in lines if len(line) > MAX_COLUMNS]


@pytest.mark.parametrize("name", list(commands()))
def test_help_ends_with_examples_that_are_understood(name: str) -> None:
    examples = commands()[name].format_help().partition("\nexample:\n")[2].splitlines()
    assert any(name in example.split() for example in examples)
    for example in examples:
        arguments = shlex.split(example.partition(" > ")[0])
        options = build_parser().parse_args(arguments[arguments.index("embedtrain") + 1 :])
        assert options.run is not None
