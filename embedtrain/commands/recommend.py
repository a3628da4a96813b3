"""`embedtrain recommend`, and the measures of a trained run of retrieval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click
import numpy as np

from embedtrain.commands.console import EXIT_DONE, command, run_argument
from embedtrain.errors import UserError
from embedtrain.recipes.retrieval.config import RetrievalConfig

if TYPE_CHECKING:
    from embedtrain.data.vocabulary import Vocabulary
    from embedtrain.distributed.runtime import Runtime
    from embedtrain.export.recommendations import Recommendation
    from embedtrain.recipes.retrieval.recipe import TrainedRetrieval

_USERS_AT_ONCE = 1024


@command("embedtrain recommend runs/m 4711 --top 10", "embedtrain recommend runs/m --all --output top.parquet")
@run_argument
@click.argument("users", nargs=-1, metavar="[USER]...", help="Raw ids, as in the data; --all for all users.")
@click.option("--all", "all_users", is_flag=True, help="All users, into the file of --output.")
@click.option("--top", type=int, default=10, show_default=True, metavar="N", help="How many items each.")
@click.option("--include-known", is_flag=True, help="Also items that the user has already.")
@click.option("--output", metavar="PATH", type=click.Path(), help="A new Parquet file, instead of printing.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
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
        UserError: the run is not one of retrieval, a user is unknown, or the output cannot be written.
    """
    if top < 1:
        raise UserError(f"the number of items must be at least 1, got {top}")
    if users is not None and not users:
        raise UserError("expected the ids of users, or --all with --output FILE")
    if users is None and output is None:
        raise UserError("--all needs --output FILE")
    from embedtrain.export.recommendations import write_recommendations

    trained, runtime = _open(run_path)
    names = trained.interactions.users
    rows = np.arange(len(names)) if users is None else _rows_of(users, names)
    batches = _recommendations(trained, rows, top, leave_out_known)
    if runtime.rank != 0:
        for _ in batches:
            pass
    elif output is not None:
        write_recommendations(batches, output, overwrite=overwrite)
        print(output)
    else:
        for user, items, scores in (each for batch in batches for each in batch):
            print(user)
            for item, score in zip(items, scores, strict=True):
                print(f"  {score:.3f}  {item}")


def evaluate_run(run_path: str) -> bool:
    """Prints the measures of a retrieval run on its held-out data; returns False for a run of another model.

    Collective: every rank.

    Raises:
        UserError: the run's configuration names no held-out data.
    """
    from embedtrain.recipes.trained import read_config

    if not isinstance(read_config(run_path), RetrievalConfig):
        return False
    trained, runtime = _open(run_path)
    if trained.measure is None:
        raise UserError(f"{run_path} was trained without evaluate.path: there are no held-out data to measure on")
    measures = trained.measure()
    if runtime.rank == 0:
        for name, value in measures.items():
            print(f"{value:.4f}  {name}")
    return True


def _open(run_path: str) -> tuple[TrainedRetrieval, Runtime]:
    from embedtrain.distributed.runtime import init_distributed
    from embedtrain.recipes.retrieval.recipe import open_retrieval
    from embedtrain.recipes.trained import read_config

    config = read_config(run_path)
    if config is None:
        raise UserError(f"no run folder at {run_path!r}; expected the run.path that a training wrote to")
    if not isinstance(config, RetrievalConfig):
        raise UserError(f"{run_path!r} is a run of {config.model}: only runs of retrieval recommend")
    runtime = init_distributed(device=config.run.device, timeout_seconds=config.run.timeout_seconds)
    return open_retrieval(config, runtime), runtime


def _rows_of(users: Sequence[str], names: Vocabulary) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    rows = names.rows_of(users)
    unknown = [user for user, row in zip(users, rows.tolist(), strict=True) if row < 0]
    if unknown:
        raise UserError(
            f"unknown user {unknown[0]!r}: not among the {len(names):,} users of the training data, such as "
            f"{', '.join(map(repr, names.words[:3]))}"
        )
    return rows


def _recommendations(
    trained: TrainedRetrieval, rows: np.ndarray[tuple[int], np.dtype[np.int64]], top: int, leave_out_known: bool
) -> Iterator[list[Recommendation]]:
    from embedtrain.recipes.retrieval.recommendation import Catalogue

    catalogue = Catalogue(trained.model)
    users, items = trained.interactions.users.words, trained.interactions.items.words
    known = trained.interactions.known if leave_out_known else None
    for start in range(0, len(rows), _USERS_AT_ONCE):
        part = rows[start : start + _USERS_AT_ONCE]
        best, scores = catalogue.best(part, top, known)
        yield [
            (users[row], [items[i] for i in chosen if i >= 0], worth[: sum(i >= 0 for i in chosen)])
            for row, chosen, worth in zip(part.tolist(), best.tolist(), scores.tolist(), strict=True)
        ]
