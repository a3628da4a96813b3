"""The command line: assembles the commands, and turns their exceptions into a message and an exit status."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

import click

from embedtrain.commands.console import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    HELP_OPTIONS,
    MAX_COLUMNS,
    PlainFormatter,
    is_debugged,
    is_first_rank,
    say,
    say_once,
)
from embedtrain.errors import CheckpointError, JobError, UserError, is_wrong_path, printable

COMMANDS = (
    "init",
    "train",
    "compare",
    "tune",
    "baseline",
    "grow",
    "plan",
    "evaluate",
    "report",
    "predict",
    "recommend",
    "neighbors",
    "export",
    "publish",
    "inspect",
    "diff",
    "config",
    "completion",
)
"""The commands, in the order of the help; `embedtrain.commands.NAME` holds the command NAME."""

_COMPLETE = "_EMBEDTRAIN_COMPLETE"
"""The variable by which the scripts of `embedtrain completion` ask for completions."""


class Program(click.Group):
    """The group of all commands; a command's module is imported when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of the commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Returns the command of this name, or None."""
        if cmd_name not in COMMANDS:
            return None
        found: click.Command = getattr(importlib.import_module(f"embedtrain.commands.{cmd_name}"), cmd_name)
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the command that the first word names, and the remaining words."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            near = click.NoSuchCommand(error.command_name, possibilities=COMMANDS, ctx=ctx)
            if near.possibilities:
                raise near from error
            message = f"{near.message} The commands are {', '.join(COMMANDS)}."
            raise click.NoSuchCommand(error.command_name, message, ctx=ctx) from error

    def invoke(self, ctx: click.Context) -> int:
        """Runs the command; returns the exit status."""
        is_shown = is_debugged()
        try:
            status: int = super().invoke(ctx)
            sys.stdout.flush()
        except UserError as error:
            if is_shown:
                raise
            say_once(printable(f"embedtrain: error: {error}"))
            status = EXIT_USER_ERROR
        except CheckpointError as error:
            if is_shown:
                raise
            say_once(f"embedtrain: failed: {error}")
            status = EXIT_FAILED
        except JobError as error:
            if is_shown:
                raise
            say(f"embedtrain: failed: {error}")
            status = EXIT_FAILED
        except KeyboardInterrupt:
            if is_first_rank():
                say("embedtrain: interrupted")
            status = EXIT_INTERRUPTED
        except BrokenPipeError:
            # The reader of the output has closed the pipe, as `| head` does.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            status = EXIT_DONE
        except OSError as error:
            if is_shown:
                raise
            status = _tell_of_file(error)
        return status


@click.group(
    cls=Program,
    no_args_is_help=False,
    context_settings={"help_option_names": HELP_OPTIONS, "max_content_width": MAX_COLUMNS},
)
@click.option("--debug", is_flag=True, help="Show a traceback for every error, also for usage errors.")
@click.version_option(package_name="embedtrain", message="%(package)s %(version)s")
def program(debug: bool) -> None:
    """Trains embedding tables sharded over the ranks of a torchrun job."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(PlainFormatter("%(message)s"))
    # Libraries such as faiss log at level INFO, which is not for the user: only their warnings are shown.
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("embedtrain").setLevel(logging.INFO if is_first_rank() else logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 1 failure, 2 usage error, 75 saved and stopped."""
    if _COMPLETE in os.environ:
        # The shell asks for completions; `embedtrain.commands.completion` registers how to print them.
        importlib.import_module("embedtrain.commands.completion")
    try:
        status: int = program.main(
            None if arguments is None else list(arguments), prog_name="embedtrain", standalone_mode=False
        )
    except click.UsageError as error:
        path = "embedtrain" if error.ctx is None else error.ctx.command_path
        say_once(f"embedtrain: error: {' '.join(error.format_message().split())} See {path} --help.")
        status = EXIT_USER_ERROR
    except click.Abort:
        status = EXIT_INTERRUPTED
    return status


def _tell_of_file(error: OSError) -> int:
    """Prints an error of the operating system about a file; returns the exit status."""
    what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    if is_wrong_path(error):
        say_once(printable(f"embedtrain: error: {what}; give another path"))
        return EXIT_USER_ERROR
    say_once(f"embedtrain: failed: {what}")
    return EXIT_FAILED
