"""Interactions that nobody had, for what a step of retrieval does with them."""

from __future__ import annotations

import numpy as np

from embedtrain.data.bags import Bags

_ITEMS_OF_USER = 32


def made_up_interactions(num_users: int, num_items: int, exponent: float) -> Bags:
    """Returns the items of each user, about 32 drawn by Zipf's law with the exponent: the popular ones are many's."""
    weights = np.arange(1, num_items + 1, dtype=np.float64) ** -exponent
    edges = np.cumsum(weights / weights.sum())
    drawn = np.searchsorted(edges, np.random.default_rng(0).random((num_users, _ITEMS_OF_USER)))
    keys = np.unique(np.arange(num_users)[:, None] * num_items + drawn.clip(max=num_items - 1))
    return Bags.from_rows(keys // num_items, keys % num_items, num_users)
