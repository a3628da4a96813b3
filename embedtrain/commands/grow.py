"""`embedtrain grow`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, settings_argument, split_words, tell
from embedtrain.errors import UserError


@command(
    "embedtrain grow runs/x runs/larger data.path=new.txt train.epochs=2",
    "torchrun --standalone --nproc-per-node 2 -m embedtrain train runs/larger/config.yaml",
)
@run_argument
@click.argument("new_path", metavar="NEW_RUN", type=click.Path(file_okay=False), help="Folder of the new run.")
@settings_argument
def grow(path: str, new_path: str, settings: Sequence[str]) -> int:
    """Creates a larger run from a trained one, with new rows."""
    paths, overrides = split_words(path, new_path, settings)
    if len(paths) != 2:
        raise UserError(f"expected the folder of a run and the folder of the new run, got {paths or 'no folder'}")
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.recipes.growing import grow_run

    old_path, new_path = paths
    for table in grow_run(old_path, new_path, overrides, init_distributed(device="cpu")):
        tell(f"table {table.name}: {table.num_kept:,} rows kept, {table.num_new:,} new")
    tell(f"train it with: embedtrain train {new_path.rstrip('/')}/config.yaml, or with torchrun on several ranks")
    return EXIT_DONE
