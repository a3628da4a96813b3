"""Reads the histories of users, predicts their next items, and measures the predictions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags, spans
from embedtrain.data.events import read_events
from embedtrain.data.histories import warn_of_left_out
from embedtrain.data.interactions import InteractionOptions, Interactions
from embedtrain.data.partition import share_of_rank
from embedtrain.data.readers import suffixes_of
from embedtrain.data.row_names import rows_among
from embedtrain.data.sources import take_sources
from embedtrain.errors import UserError
from embedtrain.export.recommendations import Recommendation
from embedtrain.recipes.base import Wanted
from embedtrain.recipes.catalogue import Catalogue, measure_lists, named_lists
from embedtrain.recipes.interactions import rows_of
from embedtrain.recipes.lists import measure_next
from embedtrain.recipes.sasrec.config import ITEM
from embedtrain.recipes.sasrec.model import Sasrec

_USERS_AT_ONCE = 1024


def histories_before_test(interactions: Interactions) -> Bags:
    """Returns the items of each user before the test part, in order: training and validation items."""
    first = interactions.sequences
    if not interactions.has_validation:
        return first
    last = interactions.validation_sequences
    rows = np.concatenate([first.rows(), last.rows()])
    order = np.argsort(rows, kind="stable")
    return Bags.from_rows(rows[order], np.concatenate([first.values, last.values])[order], len(first))


@torch.no_grad()
def encoded(model: Sasrec, histories: Bags, users: NDArray[np.int64]) -> Tensor:
    """Returns the vectors [n, dim] of users' histories, which must not be empty; each is encoded by one rank.

    Collective: every rank, with the same users.
    """
    ranks, max_length = model.tables.ranks, model.architecture.max_length
    shares = [share_of_rank(len(users), rank, ranks.size) for rank in range(ranks.size)]
    mine = users[shares[ranks.rank].start : shares[ranks.rank].stop]
    lengths = np.minimum(histories.lengths(mine), max_length)
    items = histories.values[spans(histories.starts[mine + 1] - lengths, lengths)].astype(np.int64)
    own = model.encode(torch.from_numpy(items), torch.from_numpy(lengths))
    return ranks.all_gather_rows(own, [len(share) for share in shares])


def catalogue_of(model: Sasrec) -> Catalogue:
    """Returns the vectors of all items of a model. Collective: every rank."""
    num_items = model.tables.shards[ITEM].spec.num_rows
    return Catalogue(lambda rows: model.tables({ITEM: rows})[ITEM], num_items, model.tables.ranks)


def evaluate_next(
    model: Sasrec, histories: Bags, held_out: Bags, ks: Sequence[int], alive: Callable[[], None]
) -> Mapping[str, float]:
    """Measures how well the held-out items are predicted from users' histories. Collective: every rank.

    Args:
        model: the model.
        histories: items of each user, in order. Users without items are not measured.
        held_out: the items to find, by user; -1 for an item without a row, which counts as missed.
        ks: lengths of the lists.
        alive: called after each batch of users.

    Returns:
        The measures of `measure_next`.
    """
    catalogue, queries = catalogue_of(model), functools.partial(encoded, model, histories)

    def measure(known: Bags | None, found: Bags) -> dict[str, float]:
        return measure_lists(catalogue, queries, known, found, ks, alive)

    return measure_next(measure, histories, held_out)


@dataclass(frozen=True)
class _Asked:
    """Holds the users of a request.

    Attributes:
        names: raw ids of the users.
        items: rows of each user's items, in order.
    """

    names: Sequence[str]
    items: Bags


def next_items(
    model: Sasrec, interactions: Interactions, options: InteractionOptions, wanted: Wanted
) -> Iterator[list[Recommendation]]:
    """Yields the predicted next items of users. Collective: every rank.

    Args:
        model: the model.
        interactions: the interactions of the run.
        options: options for reading files of interactions.
        wanted: the request: users and number of items. Given items must be in order, the newest last.

    Raises:
        UserError: a user or an item is unknown, a file cannot be used, or an index or features are given.
    """
    if wanted.index_path is not None or wanted.features_path is not None:
        option = "--index" if wanted.index_path is not None else "--features"
        raise UserError(f"model=sasrec does not support {option}: it predicts from histories, over all items")
    asked = model.tables.ranks.run_on_first(lambda: _asked(interactions, options, wanted))
    catalogue, item_ids = catalogue_of(model), interactions.items.words
    known = asked.items if wanted.leaves_out_known else None
    for start in range(0, len(asked.names), _USERS_AT_ONCE):
        part = np.arange(start, min(start + _USERS_AT_ONCE, len(asked.names)))
        best, scores = catalogue.best(part, wanted.top, known, encoded(model, asked.items, part))
        yield named_lists([asked.names[row] for row in part.tolist()], best, scores, item_ids)


def _asked(interactions: Interactions, options: InteractionOptions, wanted: Wanted) -> _Asked:
    if wanted.items is not None:
        rows = rows_of(wanted.items, interactions.items, "item")
        return _Asked([",".join(wanted.items)], Bags.from_rows(np.zeros(len(rows), np.int64), rows, 1))
    if wanted.history_path is not None:
        return _read(options, wanted.history_path, interactions.items.words)
    names, histories = interactions.users.words, histories_before_test(interactions)
    lengths = np.diff(histories.starts)
    if wanted.users is None:
        users = np.flatnonzero(lengths)
    else:
        users = rows_of(wanted.users, interactions.users, "user")
        if len(empty := np.flatnonzero(lengths[users] == 0)):
            raise UserError(f"user {wanted.users[int(empty[0])]!r} has no item in the data of this run")
    values, lengths = histories.of(users)
    return _Asked([names[user] for user in users.tolist()], Bags(np.append(0, np.cumsum(lengths)), values))


def _read(options: InteractionOptions, path: str, items: Sequence[str]) -> _Asked:
    """Reads users and their items, in order, from files in the format of the training data."""
    events = read_events(take_sources(path, suffixes_of(options.format)), options)
    users = events.users.codes.astype(np.int64)
    order = events.in_order(users)
    rows = rows_among(events.items.names, items)[events.items.codes][order]
    users = users[order][rows >= 0]
    if not len(users):
        raise UserError(f"{path}: none of its items is among the {len(items):,} items of the training data")
    kept, places = np.unique(users, return_inverse=True)
    warn_of_left_out(path, int((rows < 0).sum()), len(events.users.names) - len(kept))
    names = events.users.names.take(kept).to_pylist()
    return _Asked(names, Bags.from_rows(places, rows[rows >= 0], len(kept)))
