"""The command line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from embedtrain.commands.console import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_USER_ERROR,
    Commands,
    add_command,
    is_first_rank,
    say_once,
)
from embedtrain.commands.growing import add_growing
from embedtrain.commands.measuring import add_measuring
from embedtrain.commands.reading import add_reading
from embedtrain.commands.training import add_training
from embedtrain.errors import CheckpointError, UserError
from embedtrain.planning.command import add_plan_arguments, run_plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 1 failure, 2 the user's mistake, 75 saved and stopped."""
    options = _build_parser().parse_args(arguments)
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
    except BrokenPipeError:
        # Whoever read our output has seen enough, as `| head` has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_DONE
    return status


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="embedtrain", description="Trains embedding tables sharded over the ranks of a torchrun job."
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks of your mistakes too")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_training(commands)
    add_growing(commands)
    _add_planning(commands)
    add_measuring(commands)
    add_reading(commands)
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
