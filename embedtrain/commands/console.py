"""What every command has: exit statuses, lines for the user, and how a command is declared."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import socket
import sys
import time
from typing import NoReturn, TypeAlias

from embedtrain.distributed.failure import tell_launcher

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"

_PATIENCE_SECONDS = 5.0

EXIT_DONE, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """A parser whose complaints name what the user may have meant."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and leaves with the exit status of a user's mistake."""
        if is_first_rank():
            self.print_usage(sys.stderr)
        say_once(f"embedtrain: error: {message}{self._hint(message)}")
        sys.exit(EXIT_USER_ERROR)

    def _hint(self, message: str) -> str:
        known = list(self._option_string_actions)
        for action in self._actions:
            known += map(str, action.choices or ())
            if isinstance(action, argparse._SubParsersAction):
                known += [option for command in action.choices.values() for option in command._option_string_actions]
        typed = re.search(r"(?:invalid choice: '|unrecognized arguments: )([^\s'=]+)", message)
        near = difflib.get_close_matches(typed[1], known, n=1) if typed else []
        return f"; did you mean {near[0]}?" if near else ""


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
    """Returns whether this process speaks for its job, before it has joined it: rank 0, or one that is in none."""
    rank = os.environ.get("RANK", "0")
    return rank == "0" or not rank.isdecimal()


def say(line: str) -> None:
    """Prints a line for the user."""
    print(line, file=sys.stderr, flush=True)


def say_once(line: str) -> None:
    """Prints what every rank has to say alike, before they have joined.

    Rank 0 says it. The launcher ends the job when one rank has left, so the others wait for rank 0 to have spoken; one
    that outlives that wait is alone with its trouble, such as a file that its host lacks, and says so itself.
    """
    tell_launcher(line)
    if is_first_rank():
        say(line)
        return
    time.sleep(_PATIENCE_SECONDS)
    say(f"{line} (rank {os.environ['RANK']} on {socket.gethostname()})")
