"""`embedtrain train`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from embedtrain.commands.console import ConfigFile, command, is_debugged, require_config, settings_argument
from embedtrain.errors import UserError


@command(
    "torchrun --standalone --nproc-per-node 2 -m embedtrain train word2vec data.path=corpus.txt",
    "embedtrain train word2vec data.path=corpus.txt --dry-run",
)
@click.argument("config", type=ConfigFile(), help="A name, such as word2vec, or a YAML file.")
@settings_argument
@click.option("--profile", is_flag=True, help="Write a Chrome trace and the seconds per stage of 50 steps.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Make two steps on the head of the data and print the plan; do not write to the run folder.",
)
def train(config: str, settings: Sequence[str], profile: bool, dry_run: bool) -> int:
    """Trains, or resumes the run in run.path."""
    from embedtrain.recipes.loading import load_config

    loaded = load_config(*require_config(config, settings))
    if profile and dry_run:
        raise UserError("--profile and --dry-run cannot be given together: --dry-run does not write to the run folder")
    from embedtrain.commands.job import train_each, try_run

    if dry_run:
        return try_run(loaded, is_debugged=is_debugged())
    return train_each([loaded], is_debugged=is_debugged(), is_profiled=profile)
