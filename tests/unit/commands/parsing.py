"""Command lines that are read and not run."""

from __future__ import annotations

from collections.abc import Sequence

import click

from embedtrain.cli import program


def parse(arguments: Sequence[str]) -> click.Context:
    """Returns the command that a line names, with the values of its parameters; raises what a user's mistake raises."""
    command: click.Command | None = program
    context = click.Context(program, info_name="embedtrain")
    words = list(arguments)
    while isinstance(command, click.Group):
        name = words.pop(0)
        command = command.get_command(context, name)
        assert command is not None, f"there is no command {name}"
        if isinstance(command, click.Group):
            context = click.Context(command, parent=context, info_name=name)
    assert command is not None
    return command.make_context(name, words, parent=context)
