"""Computes vectors of users who are not in the training data, from their items or their features."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags
from embedtrain.data.partition import share_of_rank
from embedtrain.jagged import Jagged
from embedtrain.ops._backend.transfer import to_host
from embedtrain.recipes.retrieval.model import ITEM, USER, Retrieval

_SAMPLE = 8192
"""Maximum number of training users from which the map is learned."""

_USERS_AT_ONCE = 1024
_ROWS_AT_ONCE = 16384

_RIDGE = 1e-3
"""Strength of the ridge penalty, relative to the mean square of the map's inputs."""


class FoldIn:
    """Computes the vectors of new users from their items (fold-in).

    The input is the sum of the item vectors, divided by the square root of their number. An affine map turns it into
    the user's vector. Ridge regression on training users, whose vectors are known, finds the map. It is shrunk towards
    the best multiple of the identity, so that few users are enough. All vectors are as scores use them. Held-out items
    and new users are not used.

    Solving iALS per user has lower recall, because it assumes a squared loss, with which these models are not trained.

    Collective: every rank creates one, and calls its methods with the same arguments.

    Args:
        model: the model.
        known: the items of each training user.
    """

    def __init__(self, model: Retrieval, known: Bags) -> None:
        self._model = model
        self._ranks = model.tables.ranks
        with_items = np.flatnonzero(np.diff(known.starts))
        places = np.linspace(0, len(with_items) - 1, min(_SAMPLE, len(with_items))).astype(np.int64)
        self._map, self._bias = self._learn(with_items[places], known)

    @torch.no_grad()
    def vectors(self, users: NDArray[np.int64], histories: Bags) -> Tensor:
        """Returns the vectors [n, dim] of users, on the model's device.

        Args:
            users: [n] rows of `histories`, the same on every rank.
            histories: the items of each user, at least one per user.
        """
        shares = [share_of_rank(len(users), rank, self._ranks.size) for rank in range(self._ranks.size)]
        mine = shares[self._ranks.rank]
        found = self._sums(users[mine.start : mine.stop], histories) @ self._map + self._bias
        return self._ranks.all_gather_rows(
            self._model.as_compared(USER, found.float()), [len(share) for share in shares]
        )

    def _sums(self, users: NDArray[np.int64], histories: Bags) -> Tensor:
        """Returns each user's sum of item vectors divided by the square root of their number, [n, dim] float64.

        Collective: every rank; the users may differ.
        """
        items, lengths = histories.of(users)
        vectors = self._model.encode({ITEM: torch.from_numpy(items)})[ITEM].double()
        numbers = torch.from_numpy(lengths).to(vectors.device)
        places = torch.repeat_interleave(torch.arange(len(users), device=vectors.device), numbers)
        sums = vectors.new_zeros(len(users), vectors.shape[1]).index_add_(0, places, vectors)
        return sums / numbers.clamp(min=1).double().sqrt().unsqueeze(1)

    @torch.no_grad()
    def _learn(self, sample: NDArray[np.int64], known: Bags) -> tuple[Tensor, Tensor]:
        """Returns the map [dim, dim] and the bias [dim]. Collective: every rank."""
        moments: Tensor | float = 0.0
        for start in range(0, len(sample), _USERS_AT_ONCE):
            part = sample[start : start + _USERS_AT_ONCE]
            share = share_of_rank(len(part), self._ranks.rank, self._ranks.size)
            users = part[share.start : share.stop]
            sums = self._sums(users, known)
            trained = self._model.encode({USER: torch.from_numpy(users)})[USER].double()
            both = torch.cat([sums, sums.new_ones(len(users), 1), trained], dim=1)
            moments = moments + both.T @ both
        assert isinstance(moments, Tensor), "there are users in the training"
        moments = self._ranks.all_reduce(to_host(moments))
        dim = (len(moments) - 1) // 2
        own, cross = moments[: dim + 1, : dim + 1], moments[: dim + 1, dim + 1 :]
        square = own[:dim, :dim].trace()
        prior = torch.zeros_like(cross)
        prior[:dim] = torch.eye(dim, dtype=torch.float64) * (cross[:dim].trace() / square.clamp(min=1e-30))
        ridge = (_RIDGE * square / dim).clamp(min=1e-30) * torch.eye(dim + 1, dtype=torch.float64)
        found = torch.linalg.solve(own + ridge, cross + ridge @ prior).to(self._model.tables.device)
        return found[:dim], found[dim]


class FromFeatures:
    """Computes the vectors of new users from their features; the mean id vector of training users replaces theirs.

    Collective: every rank creates one, and calls its methods with the same arguments.

    Args:
        model: the model.
        features: categories of each user, by feature.
    """

    def __init__(self, model: Retrieval, features: Mapping[str, Bags]) -> None:
        self._model = model
        self._features = features
        self._id_vector = self._mean_id()

    @torch.no_grad()
    def vectors(self, users: NDArray[np.int64]) -> Tensor:
        """Returns the vectors [n, dim] of users, given by their rows in the features."""
        ranks = self._model.tables.ranks
        shares = [share_of_rank(len(users), rank, ranks.size) for rank in range(ranks.size)]
        mine = users[shares[ranks.rank].start : shares[ranks.rank].stop]
        described = {name: Jagged(*map(torch.from_numpy, bags.of(mine))) for name, bags in self._features.items()}
        own = self._model.encode_described(USER, self._id_vector, described, len(mine))
        return ranks.all_gather_rows(own, [len(share) for share in shares])

    @torch.no_grad()
    def _mean_id(self) -> Tensor:
        tables, num_rows = self._model.tables, self._model.sides[USER].num_rows
        mine = share_of_rank(num_rows, tables.ranks.rank, tables.ranks.size)
        total = torch.zeros(tables.shards[USER].spec.dim, dtype=torch.float64)
        # Every rank makes the same number of look-ups, because they are collective.
        for start in range(0, -(-num_rows // tables.ranks.size), _ROWS_AT_ONCE):
            part = mine[start : start + _ROWS_AT_ONCE]
            ids = torch.arange(part.start, part.stop)
            total += to_host(tables({USER: Jagged.from_ids(ids)})[USER].double().sum(dim=0))
        return (tables.ranks.all_reduce(total) / num_rows).float().to(tables.device)
