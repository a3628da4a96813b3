"""Finds the best items over the whole catalogue for many vectors, by shards and in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags
from embedtrain.data.partition import share_of_rank
from embedtrain.distributed.ranks import Ranks
from embedtrain.export.recommendations import Recommendation
from embedtrain.ops._backend.transfer import to_host
from embedtrain.recipes.lists import k_best, measure_best

_ITEMS_AT_ONCE = 16384


class Catalogue:
    """Holds the vectors of all items at the time of creation; each rank holds an equal share.

    Collective: every rank creates one, and calls its methods with the same arguments.

    Args:
        encode: collective; returns the vectors [n, dim] of items [n].
        num_items: number of all items.
        ranks: the ranks that share the items.

    Attributes:
        num_items: number of all items.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], num_items: int, ranks: Ranks) -> None:
        self.num_items = num_items
        self._encode, self._ranks = encode, ranks
        mine = share_of_rank(num_items, ranks.rank, ranks.size)
        self._first = mine.start
        self._vectors = torch.cat(list(self._encoded(mine)))

    @torch.no_grad()
    def _encoded(self, mine: range) -> Iterator[Tensor]:
        # Every rank makes the same number of look-ups, because they are collective.
        for start in range(0, -(-self.num_items // self._ranks.size) or 1, _ITEMS_AT_ONCE):
            part = mine[start : start + _ITEMS_AT_ONCE]
            yield self._encode(torch.arange(part.start, part.stop))

    @torch.no_grad()
    def best(self, users: NDArray[np.int64], k: int, known: Bags | None, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the best items of each user and their scores, the best first.

        Args:
            users: [n] rows of `known`, the same on every rank.
            k: number of items per user; at most the number of all items.
            known: items of each user to leave out; None to leave out none.
            queries: [n, dim]; vectors of the users.

        Returns:
            [n, k] int64 rows of items, -1 after the last item of a user, and their scores [n, k]; on the CPU.
        """
        k = min(k, self.num_items)
        excluded = None if known is None else known.of(users)
        scores = queries.new_full((len(users), k), -torch.inf)
        items = torch.full((len(users), k), -1, dtype=torch.int64, device=queries.device)
        for start in range(0, len(self._vectors), _ITEMS_AT_ONCE):
            block = queries @ self._vectors[start : start + _ITEMS_AT_ONCE].T
            if excluded is not None:
                _exclude(block, excluded, self._first + start)
            best = block.topk(min(k, block.shape[1]), dim=1)
            scores = torch.cat([scores, best.values], dim=1)
            items = torch.cat([items, best.indices + self._first + start], dim=1)
            scores, items = k_best(scores, items, k)
        counts = [len(users)] * self._ranks.size
        # The lists of all ranks arrive one after another, and are placed side by side to choose the best.
        scores, items = (
            self._ranks.all_gather_rows(part, counts).view(len(counts), len(users), k).transpose(0, 1).flatten(1)
            for part in (scores, items)
        )
        scores, items = k_best(scores, items, k)
        return to_host(items.masked_fill(scores == -torch.inf, -1)), to_host(scores)


def named_lists(names: Sequence[str], best: Tensor, scores: Tensor, item_ids: Sequence[str]) -> list[Recommendation]:
    """Returns the result of `Catalogue.best` with the names of users and the raw ids of items."""
    lists: list[Recommendation] = []
    for name, chosen, worth in zip(names, best.tolist(), scores.tolist(), strict=True):
        found = [item_ids[item] for item in chosen if item >= 0]
        lists.append((name, found, worth[: len(found)]))
    return lists


def _exclude(scores: Tensor, excluded: tuple[NDArray[np.int64], NDArray[np.int64]], first: int) -> None:
    """Sets the scores of each row's excluded items to minus infinity, in place; column 0 is item `first`."""
    items, lengths = excluded
    rows = np.repeat(np.arange(len(lengths)), lengths)
    is_here = (items >= first) & (items < first + scores.shape[1])
    places = torch.from_numpy(rows[is_here]), torch.from_numpy(items[is_here] - first)
    scores[tuple(place.to(scores.device) for place in places)] = -torch.inf


def measure_lists(
    catalogue: Catalogue,
    queries: Callable[[NDArray[np.int64]], Tensor],
    known: Bags | None,
    held_out: Bags,
    ks: Sequence[int],
    alive: Callable[[], None],
) -> dict[str, float]:
    """Measures the recommendations for all users with held-out items.

    Collective: every rank.

    Args:
        catalogue: the items.
        queries: collective; returns the vectors of users.
        known: items of each user to leave out of the lists; None to leave out none.
        held_out: the items to find, by user; -1 for an item without a row, which counts as missed.
        ks: lengths of the lists.
        alive: called after each batch of users.

    Returns:
        The measures of `measure_best`.
    """

    def best(users: NDArray[np.int64]) -> Tensor:
        return catalogue.best(users, max(ks), known, queries(users))[0]

    return measure_best(best, catalogue.num_items, held_out, ks, alive)
