"""The command that makes a larger run of a trained one: grow."""

from __future__ import annotations

import argparse

from embedtrain.commands.console import EXIT_DONE, Commands, add_command
from embedtrain.distributed.runtime import init_distributed
from embedtrain.recipes.growing import grow_run


def add_growing(commands: Commands) -> None:
    """Declares the command."""
    grow = add_command(
        commands,
        "grow",
        "make a new run of a trained one, with rows for the new words, users or items of other data",
        "embedtrain grow runs/x runs/larger data.path=new.txt train.epochs=2\n"
        "torchrun --nproc-per-node 2 -m embedtrain train runs/larger/config.yaml",
    )
    grow.add_argument("path", metavar="RUN", help="run folder; it is only read")
    grow.add_argument("new_path", metavar="NEW_RUN", help="folder of the new run")
    grow.add_argument(
        "overrides", nargs="*", metavar="key=value", help="data.path, and settings that replace the old run's"
    )
    grow.set_defaults(run=_grow)


def _grow(options: argparse.Namespace) -> int:
    runtime = init_distributed(device="cpu")
    for table in grow_run(options.path, options.new_path, options.overrides, runtime):
        print(f"table {table.name}: {table.num_kept:,} rows kept, {table.num_new:,} new")
    print(f"train it on with: embedtrain train {options.new_path.rstrip('/')}/config.yaml")
    return EXIT_DONE
