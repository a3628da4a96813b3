"""What every command has: exit statuses, lines for the user, and how a command is declared."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR = 0, 1, 2


def add_command(commands: Commands, name: str, summary: str, example: str) -> argparse.ArgumentParser:
    """Declares a command.

    Args:
        commands: to add it to.
        name: of the command.
        summary: a line for the list of commands and for its own help.
        example: one or more command lines that end its help.
    """
    lines = "".join(f"\n  {line}" for line in example.splitlines())
    return commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def is_first_rank() -> bool:
    """Returns whether this process is rank 0 of its job, before it has joined it."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Prints a line for the user."""
    print(line, file=sys.stderr, flush=True)


def say_once(line: str) -> None:
    """Prints what every rank has to say alike."""
    if is_first_rank():
        say(line)
