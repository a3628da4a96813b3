"""The commands that show what is there: inspect, diff and config."""

from __future__ import annotations

import argparse

from embedtrain.commands import inspect as inspection
from embedtrain.commands.console import EXIT_DONE, Commands, add_command
from embedtrain.commands.diff import print_difference
from embedtrain.recipes.showing import show_config


def add_inspecting(commands: Commands) -> None:
    """Declares the commands."""
    inspect = add_command(
        commands,
        "inspect",
        "show a run's newest checkpoint and configuration",
        "embedtrain inspect runs/x --verify",
    )
    inspect.add_argument("path", metavar="RUN", help="run folder")
    inspect.add_argument("--verify", action="store_true", help="read every byte and compare its checksum")
    inspect.set_defaults(run=_inspect)

    diff = add_command(
        commands,
        "diff",
        "show which rows moved most between two checkpoints, or two runs",
        "embedtrain diff runs/x/checkpoints/step-000001000 runs/x --top 20",
    )
    diff.add_argument("first", metavar="A", help="run folder, for its newest checkpoint, or a checkpoint's folder")
    diff.add_argument("second", metavar="B", help="likewise; other numbers of ranks may have saved it")
    diff.add_argument("--table", metavar="NAME", help="this table only")
    diff.add_argument("--top", type=int, default=10, metavar="N", help="how many rows of each table (10)")
    diff.set_defaults(run=_diff)

    config = add_command(
        commands,
        "config",
        "show a configuration in full, with where each value was given",
        "embedtrain config show configs/word2vec.yaml optimizer.lr=0.1\nembedtrain config show model=ranking",
    )
    config.add_argument("action", choices=["show"], help="what to do with it")
    config.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file; the defaults without one")
    config.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    config.set_defaults(run=_show_config)


def _inspect(options: argparse.Namespace) -> int:
    inspection.print_run(options.path, verify=options.verify)
    return EXIT_DONE


def _diff(options: argparse.Namespace) -> int:
    print_difference(options.first, options.second, options.table, options.top)
    return EXIT_DONE


def _show_config(options: argparse.Namespace) -> int:
    # Without a file the first setting stands in its place.
    path, overrides = options.config, options.overrides
    if path is not None and "=" in path:
        path, overrides = None, [path, *overrides]
    print(show_config(path, overrides))
    return EXIT_DONE
