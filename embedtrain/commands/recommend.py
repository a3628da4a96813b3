"""`embedtrain recommend`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from embedtrain.commands.console import EXIT_DONE, command, run_argument, split_names, step_option, tell
from embedtrain.errors import UserError

if TYPE_CHECKING:
    from embedtrain.checkpoint.choice import Step


@command(
    "embedtrain recommend runs/m 4711 --top 10",
    "embedtrain recommend runs/m --items 17,42 --top 10",
    "embedtrain recommend runs/m --all --output top.parquet",
)
@run_argument
@click.argument("users", nargs=-1, metavar="[USER]...", help="Raw ids, as in the data; --all for all users.")
@click.option("--all", "all_users", is_flag=True, help="Recommend to all users; needs --output.")
@click.option("--items", metavar="IDS", help="Items of one new user, such as 17,42.")
@click.option(
    "--history", metavar="PATH", type=click.Path(), help="New users: files of users and items, like data.path."
)
@click.option(
    "--features", metavar="PATH", type=click.Path(), help="New users: files of user features, like users.path."
)
@click.option("--top", type=int, default=10, show_default=True, metavar="N", help="Number of items per user.")
@click.option("--include-known", is_flag=True, help="Also recommend items that the user already has.")
@click.option(
    "--output", metavar="PATH", type=click.Path(), help="New Parquet file; without it, recommendations are printed."
)
@click.option("--overwrite", is_flag=True, help="Replace the file of --output if it exists.")
@click.option("--index", metavar="PATH", type=click.Path(), help="Index made by export --format faiss; faster.")
@step_option
def recommend(
    path: str,
    users: Sequence[str],
    all_users: bool,
    top: int,
    output: str | None,
    overwrite: bool,
    step: Step,
    **asked: Any,
) -> int:
    """Recommends items to users with a run of retrieval or SASRec."""
    items = split_names(asked["items"], "--items", "item", may_repeat=True)
    _require_one(users, all_users, asked)
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
    if all_users and output is None:
        raise UserError("--all needs --output FILE")
    if overwrite and output is None:
        raise UserError("--overwrite needs a file to replace: give --output FILE too")
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.export.recommendations import write_recommendations
    from embedtrain.recipes.base import Wanted
    from embedtrain.recipes.registry import recipe_of
    from embedtrain.recipes.trained import checkpoint_of, require_config

    if output is not None:
        _check_output(output, asked)
    config = require_config(path)
    best_of = recipe_of(config.model).recommend
    if best_of is None:
        raise UserError(f"{path!r} is a run of {config.model}, which cannot recommend")
    checkpoint = checkpoint_of(path, step)
    runtime = init_distributed(device=config.run.device, timeout_seconds=config.run.timeout_seconds)
    wanted = Wanted(
        users or None,
        top,
        leaves_out_known=not asked["include_known"],
        items=items or None,
        history_path=asked["history"],
        features_path=asked["features"],
        index_path=asked["index"],
    )
    # Under torchrun every rank holds a part of the items.
    batches = best_of(config, runtime, checkpoint, wanted)
    if runtime.rank != 0:
        for _ in batches:
            pass
    elif output is not None:
        write_recommendations(batches, output, overwrite=overwrite)
        tell(output)
    else:
        for user, best, scores in (each for batch in batches for each in batch):
            tell(user)
            for item, score in zip(best, scores, strict=True):
                tell(f"  {score:.3f}  {item}")
            if not best:
                tell("  no items: the user already has every item (--include-known shows them)")
    return EXIT_DONE


def _check_output(output: str, asked: Mapping[str, Any]) -> None:
    """Checks that the output has a valid name and is not an input file."""
    from embedtrain.export.recommendations import refuse_other_name
    from embedtrain.export.storage import refuse_input

    refuse_other_name(output)
    for option in ("history", "features"):
        if asked[option] is not None:
            refuse_input(output, [asked[option]], f"--{option}")


def _require_one(users: Sequence[str], all_users: bool, asked: Mapping[str, Any]) -> None:
    """Checks that the users are given in exactly one way."""
    options = {f"--{name}": asked[name] is not None for name in ("items", "history", "features")}
    given = [way for way, is_given in {"--all": all_users, **options, ", ".join(users): users}.items() if is_given]
    if len(given) > 1:
        raise UserError(
            f"expected the ids of users or --all, or one of {', '.join(options)}, got {' and '.join(given)}"
        )
    if not given:
        raise UserError("expected the ids of users, --items IDS, --history FILE, or --all with --output FILE")
