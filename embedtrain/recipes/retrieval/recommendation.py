"""The best items of each user over the whole catalogue: by shards, in batches, never a users x items matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags
from embedtrain.data.partition import share_of_rank
from embedtrain.recipes.lists import measure_best
from embedtrain.recipes.retrieval.model import ITEM, USER, Retrieval

_ITEMS_AT_ONCE = 16384


class Catalogue:
    """The vectors of all items as they are now; each rank holds the vectors of its part of the rows.

    Collective: every rank makes one, and calls its methods with the same arguments.

    Args:
        model: the model.

    Attributes:
        model: the model.
        num_items: how many items there are.
    """

    def __init__(self, model: Retrieval) -> None:
        self.model = model
        self._ranks = model.tables.ranks
        self.num_items = model.sides[ITEM].num_rows
        mine = share_of_rank(self.num_items, self._ranks.rank, self._ranks.size)
        self._first = mine.start
        self._vectors = torch.cat(list(self._encoded(mine)))

    @torch.no_grad()
    def _encoded(self, mine: range) -> Iterator[Tensor]:
        # As many look-ups on every rank as the one with the most rows needs.
        for start in range(0, -(-self.num_items // self._ranks.size) or 1, _ITEMS_AT_ONCE):
            part = mine[start : start + _ITEMS_AT_ONCE]
            yield self.model.encode({ITEM: torch.arange(part.start, part.stop)})[ITEM]

    @torch.no_grad()
    def best(
        self, users: NDArray[np.int64], k: int, known: Bags | None, queries: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the best items of each user and their scores, the best first.

        Args:
            users: [n] rows, the same on every rank.
            k: how many; fewer if there are no more items.
            known: the items of each user, which are left out; None to leave out none.
            queries: [n, dim], the vectors of the users; None for those of the model.

        Returns:
            [n, k] int64 rows of items, -1 if a user has no more, and their scores [n, k], on the CPU.
        """
        if queries is None:
            queries = user_vectors(self.model, users)
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


@torch.no_grad()
def user_vectors(model: Retrieval, users: NDArray[np.int64]) -> Tensor:
    """Returns the vectors [n, dim] of users of the training, each encoded by one rank. Collective: every rank.

    Args:
        model: the model.
        users: [n] rows, the same on every rank.
    """
    ranks = model.tables.ranks
    shares = [share_of_rank(len(users), rank, ranks.size) for rank in range(ranks.size)]
    mine = shares[ranks.rank]
    own = model.encode({USER: torch.from_numpy(users[mine.start : mine.stop])})[USER]
    return ranks.all_gather_rows(own, [len(share) for share in shares])


@torch.no_grad()
def all_vectors(model: Retrieval, side: str) -> Tensor:
    """Returns the vectors of all users or items, in order of their rows; [num_rows, dim] on the CPU of every rank.

    Collective: every rank. For sides that fit.
    """
    num_rows = model.sides[side].num_rows
    starts = range(0, num_rows, _ITEMS_AT_ONCE)
    blocks = [
        model.encode({side: torch.arange(start, min(start + _ITEMS_AT_ONCE, num_rows))})[side].cpu() for start in starts
    ]
    return torch.cat(blocks)


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


def evaluate_retrieval(
    model: Retrieval, known: Bags, held_out: Bags, ks: Sequence[int], alive: Callable[[], None]
) -> dict[str, float]:
    """Measures the recommendations for all users with held-out items; see `measure_lists`."""
    return measure_lists(Catalogue(model), lambda users: None, known, held_out, ks, alive)


def measure_lists(
    catalogue: Catalogue,
    queries: Callable[[NDArray[np.int64]], Tensor | None],
    known: Bags,
    held_out: Bags,
    ks: Sequence[int],
    alive: Callable[[], None],
) -> dict[str, float]:
    """Measures the recommendations for all users with held-out items, those they are known to have left out.

    Collective: every rank.

    Args:
        catalogue: the items.
        queries: returns the vectors of users, as `Catalogue.best` takes them.
        known: the items that each user is known to have.
        held_out: the items to find; -1 for one that cannot be found, and counts as missed.
        ks: lengths of the list.
        alive: called now and then.

    Returns:
        As `measure_best`.
    """

    def best(users: NDArray[np.int64]) -> Tensor:
        return catalogue.best(users, max(ks), known, queries(users))[0]

    return measure_best(best, catalogue.num_items, held_out, ks, alive)
