"""The best items for each of many vectors over the whole catalogue, by shards and in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags
from embedtrain.data.partition import share_of_rank
from embedtrain.distributed.ranks import Ranks
from embedtrain.metrics.ranking import hits_of, list_measures, mean_measures, name_at

_USERS_AT_ONCE = 1024
_ITEMS_AT_ONCE = 16384


class Catalogue:
    """The vectors of all items as they are now; each rank holds the vectors of its part of the rows.

    Collective: every rank makes one, and calls its methods with the same arguments.

    Args:
        encode: collective; returns the vectors [n, dim] of rows of items [n].
        num_items: how many items there are.
        ranks: those that share the items.

    Attributes:
        num_items: how many items there are.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], num_items: int, ranks: Ranks) -> None:
        self.num_items = num_items
        self._encode, self._ranks = encode, ranks
        mine = share_of_rank(num_items, ranks.rank, ranks.size)
        self._first = mine.start
        self._vectors = torch.cat(list(self._encoded(mine)))

    @torch.no_grad()
    def _encoded(self, mine: range) -> Iterator[Tensor]:
        # As many look-ups on every rank as the one with the most rows needs.
        for start in range(0, -(-self.num_items // self._ranks.size) or 1, _ITEMS_AT_ONCE):
            part = mine[start : start + _ITEMS_AT_ONCE]
            yield self._encode(torch.arange(part.start, part.stop))

    @torch.no_grad()
    def best(self, users: NDArray[np.int64], k: int, known: Bags | None, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the best items of each user and their scores, the best first.

        Args:
            users: [n] rows of `known`, the same on every rank.
            k: how many; fewer if there are no more items.
            known: the items of each user, which are left out; None to leave out none.
            queries: [n, dim], the vectors of the users.

        Returns:
            [n, k] int64 rows of items, -1 if a user has no more, and their scores [n, k], on the CPU.
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
            scores, items = _first(scores, items, k)
        counts = [len(users)] * self._ranks.size
        # Rank by rank below each other; then beside each other, to choose among.
        scores, items = (
            self._ranks.all_gather_rows(part, counts).view(len(counts), len(users), k).transpose(0, 1).flatten(1)
            for part in (scores, items)
        )
        scores, items = _first(scores, items, k)
        return items.masked_fill(scores == -torch.inf, -1).cpu(), scores.cpu()


def _exclude(scores: Tensor, excluded: tuple[NDArray[np.int64], NDArray[np.int64]], first: int) -> None:
    """Puts minus infinity in place at the excluded items of each row of scores of items `first` and on."""
    items, lengths = excluded
    rows = np.repeat(np.arange(len(lengths)), lengths)
    is_here = (items >= first) & (items < first + scores.shape[1])
    places = torch.from_numpy(rows[is_here]), torch.from_numpy(items[is_here] - first)
    scores[tuple(place.to(scores.device) for place in places)] = -torch.inf


def _first(scores: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Returns the k best of each row, the best first; of equal ones the lower item."""
    order = items.argsort(dim=1, stable=True)
    scores, items = scores.gather(1, order), items.gather(1, order)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order), items.gather(1, order)


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
        known: the items of each user that are left out of the lists; None to leave out none.
        held_out: the items to find; -1 for one that cannot be found, and counts as missed.
        ks: lengths of the list.
        alive: called now and then.

    Returns:
        "recall@20" and the like: means over the users; "item_coverage@20": the share of items in any list.
    """
    users = np.flatnonzero(np.diff(held_out.starts))
    sums = torch.zeros(len(ks), 4, dtype=torch.float64)
    is_recommended = torch.zeros(len(ks), catalogue.num_items, dtype=torch.bool)
    for start in range(0, len(users), _USERS_AT_ONCE):
        batch = users[start : start + _USERS_AT_ONCE]
        items, _ = catalogue.best(batch, max(ks), known, queries(batch))
        relevant, lengths = (torch.from_numpy(part) for part in held_out.of(batch))
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        hits = hits_of(items, starts, relevant, catalogue.num_items)
        for row, k in enumerate(ks):
            sums[row] += list_measures(hits, lengths, k)
            is_recommended[row, items[:, :k][items[:, :k] >= 0]] = True
        alive()
    measures = mean_measures(sums, len(users), ks)
    coverage = {name_at("item_coverage", k): float(is_recommended[row].double().mean()) for row, k in enumerate(ks)}
    return {**measures, **coverage}
