"""What the command line does with a trained run of retrieval: recommend, and measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from embedtrain.data.vocabulary import Vocabulary
from embedtrain.distributed.runtime import Runtime, init_distributed
from embedtrain.errors import UserError
from embedtrain.export.recommendations import Recommendation, write_recommendations
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.retrieval.recipe import TrainedRetrieval, open_retrieval
from embedtrain.recipes.retrieval.recommendation import Catalogue
from embedtrain.recipes.trained import read_config

_USERS_AT_ONCE = 1024


def recommend(
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
