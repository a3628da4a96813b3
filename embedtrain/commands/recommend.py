"""`embedtrain recommend`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, tell
from embedtrain.errors import UserError


@command("embedtrain recommend runs/m 4711 --top 10", "embedtrain recommend runs/m --all --output top.parquet")
@run_argument
@click.argument("users", nargs=-1, metavar="[USER]...", help="Raw ids, as in the data; --all for all users.")
@click.option("--all", "all_users", is_flag=True, help="All users, into the file of --output.")
@click.option("--top", type=int, default=10, show_default=True, metavar="N", help="How many items each.")
@click.option("--include-known", is_flag=True, help="Also items that the user has already.")
@click.option("--output", metavar="PATH", type=click.Path(), help="A new Parquet file, instead of printing.")
@click.option("--overwrite", is_flag=True, help="Replace the file of --output if it exists.")
def recommend(
    path: str,
    users: Sequence[str],
    all_users: bool,
    top: int,
    include_known: bool,
    output: str | None,
    overwrite: bool,
) -> int:
    """Prints or writes the best items of users of a retrieval run."""
    if users and all_users:
        raise UserError(f"expected the ids of users or --all, got --all and {', '.join(users)}")
    recommend_items(
        path,
        None if all_users else users,
        top=top,
        leave_out_known=not include_known,
        output=output,
        overwrite=overwrite,
    )
    return EXIT_DONE


def recommend_items(
    run_path: str,
    users: Sequence[str] | None,
    *,
    top: int,
    leave_out_known: bool,
    output: str | None,
    overwrite: bool,
) -> None:
    """Prints the best items of users, or writes them to a Parquet file.

    Under torchrun every rank holds its part of the items. Collective: every rank.

    Args:
        run_path: the run folder.
        users: raw ids; None for all users.
        top: how many items each.
        leave_out_known: whether items that a user has in the training data are left out.
        output: path or fsspec URL of the new file; None to print.
        overwrite: whether a file that is there already is replaced.

    Raises:
        UserError: the run is of a model that does not recommend, a user is unknown, or the output cannot be written.
    """
    if top < 1:
        raise UserError(f"the number of items must be at least 1, got {top}")
    if users is not None and not users:
        raise UserError("expected the ids of users, or --all with --output FILE")
    if users is None and output is None:
        raise UserError("--all needs --output FILE")
    if overwrite and output is None:
        raise UserError("--overwrite replaces the file of --output: give --output FILE too")
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.export.recommendations import write_recommendations
    from embedtrain.recipes.registry import recipe_of
    from embedtrain.recipes.trained import require_config

    config = require_config(run_path)
    best_of = recipe_of(config.model).recommend
    if best_of is None:
        raise UserError(f"{run_path!r} is a run of {config.model}, which does not recommend")
    runtime = init_distributed(device=config.run.device, timeout_seconds=config.run.timeout_seconds)
    batches = best_of(config, runtime, users, top, leave_out_known)
    if runtime.rank != 0:
        for _ in batches:
            pass
    elif output is not None:
        write_recommendations(batches, output, overwrite=overwrite)
        tell(output)
    else:
        for user, items, scores in (each for batch in batches for each in batch):
            tell(user)
            for item, score in zip(items, scores, strict=True):
                tell(f"  {score:.3f}  {item}")
