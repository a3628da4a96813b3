"""Recommends items to users in the training data, and to users who are known only by items or features."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags, distinct
from embedtrain.data.histories import Histories, known_part, read_described, read_histories, split_histories
from embedtrain.data.interactions import InteractionOptions, Interactions
from embedtrain.errors import UserError
from embedtrain.export.recommendations import Recommendation
from embedtrain.recipes.base import Wanted
from embedtrain.recipes.catalogue import measure_lists, named_lists
from embedtrain.recipes.interactions import rows_of
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.retrieval.folding import FoldIn, FromFeatures
from embedtrain.recipes.retrieval.indexed import IndexedCatalogue
from embedtrain.recipes.retrieval.model import Retrieval
from embedtrain.recipes.retrieval.recommendation import catalogue_of, user_vectors

_USERS_AT_ONCE = 1024

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Asked:
    """Holds the users of a request.

    Attributes:
        names: raw ids of the users.
        known: items that each user has.
        vectors: returns the vectors of users by index.
    """

    names: Sequence[str]
    known: Bags
    vectors: Callable[[NDArray[np.int64]], Tensor]


def best_items(
    model: Retrieval, interactions: Interactions, options: InteractionOptions, wanted: Wanted, checkpoint: str
) -> Iterator[list[Recommendation]]:
    """Yields the best items of users. Collective: every rank.

    Args:
        model: the model.
        interactions: the interactions of the run.
        options: options for reading files of interactions.
        wanted: the request: users and number of items.
        checkpoint: path of the checkpoint that the model was restored from.

    Raises:
        UserError: a user or item is unknown, or a file or an index cannot be used.
    """
    if wanted.features_path is not None:
        asked = _described(model, interactions, options, wanted.features_path)
    elif wanted.items is not None or wanted.history_path is not None:
        asked = _folded_in(model, interactions, options, wanted)
    else:
        asked = _Asked(interactions.users.words, interactions.known_before_test, functools.partial(user_vectors, model))
    rows = np.arange(len(asked.names))
    if wanted.users is not None:
        rows = rows_of(wanted.users, interactions.users, "user")
    index = wanted.index_path
    catalogue = catalogue_of(model) if index is None else IndexedCatalogue(model, index, checkpoint)
    item_ids = interactions.items.words
    excluded = asked.known if wanted.leaves_out_known else None
    for start in range(0, len(rows), _USERS_AT_ONCE):
        part = rows[start : start + _USERS_AT_ONCE]
        best, scores = catalogue.best(part, wanted.top, excluded, asked.vectors(part))
        yield named_lists([asked.names[row] for row in part.tolist()], best, scores, item_ids)


def measure_unseen(
    config: RetrievalConfig, model: Retrieval, interactions: Interactions, options: InteractionOptions, fraction: float
) -> dict[str, float]:
    """Measures the recommendations for users who are not in the training data, folded in from a part of their items.

    Collective: every rank.

    Args:
        config: configuration of the run.
        model: the model.
        interactions: the interactions of the run.
        options: options for reading the users' files, which `held_out_path` names.
        fraction: share of a user's items that are used to fold in the user; the others are to be found.

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
    return measure_lists(catalogue_of(model), queries, known, wanted, config.evaluate.k, alive=lambda: None)


def _folded_in(model: Retrieval, interactions: Interactions, options: InteractionOptions, wanted: Wanted) -> _Asked:
    """Returns the users of a request by items, some of whom may be in the training data. Collective: every rank."""
    found, trained = model.tables.ranks.run_on_first(lambda: _histories(wanted, interactions, options))
    fold_in = FoldIn(model, interactions.known)

    def vectors(users: NDArray[np.int64]) -> Tensor:
        is_trained = trained[users] >= 0
        of_new = fold_in.vectors(users[~is_trained], found.items)
        of_trained = user_vectors(model, trained[users[is_trained]])
        both, order = torch.cat([of_new, of_trained]), np.argsort(is_trained, kind="stable")
        return both[torch.from_numpy(np.argsort(order)).to(both.device)]

    return _Asked(found.users, _with_known(found.items, interactions.known_before_test, trained), vectors)


def _with_known(given: Bags, known: Bags, trained: NDArray[np.int64]) -> Bags:
    """Returns the union of the given items and the training items of each user.

    Args:
        given: given items of each user.
        known: training items of each user in the training data.
        trained: [num_users] row of each user in the training data; -1 for a new user.
    """
    rows = np.flatnonzero(trained >= 0)
    items, lengths = known.of(trained[rows])
    users, values = np.concatenate([given.rows(), np.repeat(rows, lengths)]), np.concatenate([given.values, items])
    users, values = distinct(users, values)
    return Bags.from_rows(users, values, len(given))


def _described(model: Retrieval, interactions: Interactions, options: InteractionOptions, path: str) -> _Asked:
    """Returns the users in files of features. Collective: every rank."""
    tables = interactions.categories("users")
    if not tables:
        raise UserError(f"--features {path}: the users of this run have no features: give --items or --history")
    values = {name: table["word"].cast(pa.large_string()).to_pylist() for name, table in tables.items()}
    names, features = model.tables.ranks.run_on_first(lambda: read_described(options.users, path, values))
    nothing = Bags(np.zeros(len(names) + 1, np.int64), np.zeros(0, np.int64))
    return _Asked(names, nothing, FromFeatures(model, features).vectors)


def _histories(
    wanted: Wanted, interactions: Interactions, options: InteractionOptions
) -> tuple[Histories, NDArray[np.int64]]:
    """Returns the users of a request with their items, and the row of each in the training data; -1 for a new user."""
    if wanted.history_path is not None:
        found = read_histories(options, wanted.history_path, interactions.items)
        return known_part(found, wanted.history_path, interactions)
    assert wanted.items is not None
    rows = np.unique(rows_of(wanted.items, interactions.items, "item"))
    bags = Bags.from_rows(np.zeros(len(rows), np.int64), rows, 1)
    return Histories([",".join(wanted.items)], bags), np.array([-1])
