"""The command line."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence

from embedtrain.commands.completion import add_completion
from embedtrain.commands.config import add_inspecting
from embedtrain.commands.console import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Commands,
    Parser,
    add_command,
    is_first_rank,
    say,
    say_once,
)
from embedtrain.commands.evaluate import add_measuring
from embedtrain.commands.export import add_reading
from embedtrain.commands.grow import add_growing
from embedtrain.commands.plan import add_plan_arguments, run_plan
from embedtrain.commands.train import add_training
from embedtrain.errors import CheckpointError, JobError, UserError

_WRONG_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""What the system says of a path that cannot be used, as it says ENOSPC or EIO of a disk."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 1 failure, 2 the user's mistake, 75 saved and stopped."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("embedtrain").setLevel(logging.INFO if is_first_rank() else logging.ERROR)
    try:
        status: int = options.run(options)
    except UserError as error:
        if options.debug:
            raise
        say_once(f"embedtrain: error: {error}")
        status = EXIT_USER_ERROR
    except CheckpointError as error:
        if options.debug:
            raise
        say_once(f"embedtrain: failed: {error}")
        status = EXIT_FAILED
    except JobError as error:
        if options.debug:
            raise
        say(f"embedtrain: failed: {error}")
        status = EXIT_FAILED
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough, as `| head` has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_DONE
    except OSError as error:
        if options.debug:
            raise
        status = _tell_of_file(error)
    return status


def _tell_of_file(error: OSError) -> int:
    """Says what the system refused to do with a file; returns the exit status."""
    what = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
    if error.errno in _WRONG_PATH:
        say_once(f"embedtrain: error: {what}; give another path")
        return EXIT_USER_ERROR
    say_once(f"embedtrain: failed: {what}")
    return EXIT_FAILED


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line; settings may stand anywhere, as they may not for argparse once an option has come."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    settings = [each for each in rest if "=" in each and not each.startswith("-")]
    if settings == rest and hasattr(options, "overrides"):
        options.overrides += settings
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; `run` of what it returns runs the command."""
    parser = Parser(prog="embedtrain", description="Trains embedding tables sharded over the ranks of a torchrun job.")
    parser.add_argument("--debug", action="store_true", help="show tracebacks of your mistakes too")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_training(commands)
    add_growing(commands)
    _add_planning(commands)
    add_measuring(commands)
    add_inspecting(commands)
    add_reading(commands)
    add_completion(commands, build_parser)
    return parser


def _add_planning(commands: Commands) -> None:
    plan = add_command(
        commands,
        "plan",
        "what a run will need on each rank, and how long a step takes",
        "embedtrain plan configs/word2vec.yaml --rows 10e6 --world-size 8 --memory 16GiB",
    )
    add_plan_arguments(plan)
    plan.set_defaults(run=run_plan)
