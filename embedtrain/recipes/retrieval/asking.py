"""What a retrieval model answers: the best items of users of the training, and of users who were not there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags
from embedtrain.data.histories import Histories, known_part, read_histories, split_histories
from embedtrain.data.interactions import InteractionOptions, Interactions
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.errors import UserError
from embedtrain.export.recommendations import Recommendation
from embedtrain.recipes.base import Wanted
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.retrieval.folding import FoldIn
from embedtrain.recipes.retrieval.indexed import IndexedCatalogue
from embedtrain.recipes.retrieval.model import Retrieval
from embedtrain.recipes.retrieval.recommendation import Catalogue, measure_lists

_USERS_AT_ONCE = 1024

_logger = logging.getLogger(__name__)


def best_items(
    model: Retrieval, interactions: Interactions, options: InteractionOptions, wanted: Wanted, checkpoint: str
) -> Iterator[list[Recommendation]]:
    """Yields the best items of users. Collective: every rank.

    Args:
        model: the model.
        interactions: those of the training.
        options: how files of interactions are read.
        wanted: which users, and how many items.
        checkpoint: path of the checkpoint that the model was restored from.

    Raises:
        UserError: a user or item is unknown, or a file or an index cannot be used.
    """
    ranks, queries = model.tables.ranks, _of_the_model
    if wanted.items is None and wanted.history_path is None:
        all_users = np.arange(len(interactions.users))
        rows = all_users if wanted.users is None else _rows_of(wanted.users, interactions.users, "user")
        names: Sequence[str] = interactions.users.words
        known = interactions.known
    else:
        asked = ranks.run_on_first(lambda: _histories(wanted, interactions.items, options))
        fold_in = FoldIn(model, interactions.known)
        names, known, rows = asked.users, asked.items, np.arange(len(asked.users))

        def queries(users: NDArray[np.int64]) -> Tensor | None:
            return fold_in.vectors(users, asked.items)

    index = wanted.index_path
    catalogue = Catalogue(model) if index is None else IndexedCatalogue(model, index, checkpoint)
    item_ids = interactions.items.words
    excluded = known if wanted.leaves_out_known else None
    for start in range(0, len(rows), _USERS_AT_ONCE):
        part = rows[start : start + _USERS_AT_ONCE]
        best, scores = catalogue.best(part, wanted.top, excluded, queries(part))
        yield [
            (names[row], [item_ids[i] for i in chosen if i >= 0], worth[: sum(i >= 0 for i in chosen)])
            for row, chosen, worth in zip(part.tolist(), best.tolist(), scores.tolist(), strict=True)
        ]


def measure_unseen(
    config: RetrievalConfig, model: Retrieval, interactions: Interactions, options: InteractionOptions, fraction: float
) -> dict[str, float]:
    """Measures the recommendations for users who were not in the training, folded in from a part of their items.

    Collective: every rank.

    Args:
        config: of the run.
        model: the model.
        interactions: those of the training.
        options: `held_out_path` names the files of the users.
        fraction: of a user's items that they are folded in from; the others are to be found.

    Raises:
        UserError: the files cannot be used, or have no such user.
    """
    path = str(options.held_out_path)

    def read() -> tuple[Bags, Bags]:
        found = read_histories(options, path, interactions.items)
        return split_histories(found, fraction, interactions.users, config.seed, path)

    known, wanted = model.tables.ranks.run_on_first(read)
    fold_in = FoldIn(model, interactions.known)
    queries: Callable[[NDArray[np.int64]], Tensor] = lambda users: fold_in.vectors(users, known)  # noqa: E731
    return measure_lists(Catalogue(model), queries, known, wanted, config.evaluate.k, alive=lambda: None)


def _of_the_model(users: NDArray[np.int64]) -> Tensor | None:
    """Returns None: users of the training have vectors of their own."""
    return None


def _histories(wanted: Wanted, items: Vocabulary, options: InteractionOptions) -> Histories:
    if wanted.history_path is not None:
        found = read_histories(options, wanted.history_path, items)
        return known_part(found, wanted.history_path, len(items))
    assert wanted.items is not None
    rows = np.unique(_rows_of(wanted.items, items, "item"))
    return Histories([",".join(wanted.items)], Bags.from_rows(np.zeros(len(rows), np.int64), rows, 1))


def _rows_of(names: Sequence[str], vocabulary: Vocabulary, noun: str) -> NDArray[np.int64]:
    rows = vocabulary.rows_of(names)
    unknown = [name for name, row in zip(names, rows.tolist(), strict=True) if row < 0]
    if unknown:
        raise UserError(
            f"unknown {noun} {unknown[0]!r}: not among the {len(vocabulary):,} {noun}s of the training data, such as "
            f"{', '.join(map(repr, vocabulary.words[:3]))}"
        )
    return rows
