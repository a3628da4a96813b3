"""Measures recommendation lists of any model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags, without
from embedtrain.metrics.ranking import hits_of, list_measures, mean_measures, measure_names, name_at

_USERS_AT_ONCE = 1024
_logger = logging.getLogger(__name__)
_MASKED = "masked_"
"""Prefix of the names of measures of lists that leave out the items of the history."""


def k_best(scores: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the scores and items of the k best of each row, the best first; equal scores are in order of items."""
    order = items.argsort(dim=1, stable=True)
    scores, items = scores.gather(1, order), items.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), items.gather(1, order)


def measure_best(
    best: Callable[[NDArray[np.int64]], Tensor],
    num_items: int,
    held_out: Bags,
    ks: Sequence[int],
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Measures the recommendations for all users with held-out items.

    Args:
        best: returns the best items [n, max(ks) or more] of users [n], the best first, -1 for none. Called with the
            same users on every rank.
        num_items: number of all items.
        held_out: the items to find, by user; -1 for an item without a row, which counts as missed.
        ks: lengths of the lists.
        alive: called after each batch of users.

    Returns:
        Means over the users, such as "recall@20"; and "item_coverage@20", the share of all items in any list.
    """
    users = np.flatnonzero(np.diff(held_out.starts))
    if not len(users):
        _logger.warning("no user has a held-out item that a list could hold: all measures are 0")
    sums = torch.zeros(len(ks), 4, dtype=torch.float64)
    is_recommended = torch.zeros(len(ks), num_items, dtype=torch.bool)
    for start in range(0, len(users), _USERS_AT_ONCE):
        batch = users[start : start + _USERS_AT_ONCE]
        items = best(batch)
        relevant, lengths = (torch.from_numpy(part) for part in held_out.of(batch))
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        hits = hits_of(items, starts, relevant, num_items)
        for row, k in enumerate(ks):
            sums[row] += list_measures(hits, lengths, k)
            is_recommended[row, items[:, :k][items[:, :k] >= 0]] = True
        alive()
    measures = mean_measures(sums, len(users), ks)
    coverage = {name_at("item_coverage", k): float(is_recommended[row].double().mean()) for row, k in enumerate(ks)}
    return {**measures, **coverage}


def measure_next(
    measure: Callable[[Bags | None, Bags], Mapping[str, float]], histories: Bags, held_out: Bags
) -> dict[str, float]:
    """Measures predictions of next items, for users with a history.

    Args:
        measure: returns the measures for items to leave out of each user's list (None to leave out none) and held-out
            items.
        histories: the items of each user.
        held_out: the items to find, by user; -1 for an item without a row, which counts as missed.

    Returns:
        The measures over all items; and with the prefix `masked_` the measures of lists without the items of the
        history, except held-out items.
    """
    rows = held_out.rows()
    has_history = histories.lengths(rows) > 0
    held_out = Bags.from_rows(rows[has_history], held_out.values[has_history], len(held_out))
    masked = measure(without(histories, held_out), held_out)
    return {**measure(None, held_out), **{f"{_MASKED}{name}": value for name, value in masked.items()}}


def names_of_next(ks: Sequence[int]) -> list[str]:
    """Returns the names of the measures that `measure_next` returns."""
    return [f"{begin}{name}" for begin in ("", _MASKED) for name in measure_names(ks)]
