"""Computes the vectors of users and items, and measures recommendations over the whole catalogue."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.bags import Bags
from embedtrain.data.partition import share_of_rank
from embedtrain.ops._backend.transfer import to_host
from embedtrain.recipes.catalogue import Catalogue, measure_lists
from embedtrain.recipes.retrieval.model import ITEM, USER, Retrieval

_ROWS_AT_ONCE = 16384


def catalogue_of(model: Retrieval) -> Catalogue:
    """Returns the vectors of all items of a model. Collective: every rank."""
    return Catalogue(lambda rows: model.encode({ITEM: rows})[ITEM], model.sides[ITEM].num_rows, model.tables.ranks)


@torch.no_grad()
def user_vectors(model: Retrieval, users: NDArray[np.int64]) -> Tensor:
    """Returns the vectors [n, dim] of users in the training data; each is computed by one rank.

    Collective: every rank.

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
    """Returns the vectors of all users or items in the order of rows; [num_rows, dim] on the CPU of every rank.

    Collective: every rank. The result must fit into the memory of each rank.
    """
    num_rows = model.sides[side].num_rows
    starts = range(0, num_rows, _ROWS_AT_ONCE)
    blocks = [
        to_host(model.encode({side: torch.arange(start, min(start + _ROWS_AT_ONCE, num_rows))})[side])
        for start in starts
    ]
    return torch.cat(blocks)


def evaluate_retrieval(
    model: Retrieval, known: Bags, held_out: Bags, ks: Sequence[int], alive: Callable[[], None]
) -> dict[str, float]:
    """Measures the recommendations for all users with held-out items; see `measure_lists`."""
    return measure_lists(catalogue_of(model), functools.partial(user_vectors, model), known, held_out, ks, alive)
