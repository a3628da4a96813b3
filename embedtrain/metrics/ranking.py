"""Measures of recommendation lists, defined as in RecBole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("recall", "ndcg", "hit", "mrr")
"""Names of the measures that are means over users; `item_coverage`, of all lists together, is not among them."""


def list_measures(hits: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Returns the sums over users of the measures of their first `k` recommendations.

    A hit is a relevant recommendation. With `r` the position of a hit, from 1, and `n` the number of relevant items:

    * recall: hits / n
    * ndcg: sum of 1 / log2(r + 1) over the hits, divided by the same sum over the positions 1 to min(n, k)
    * hit: 1 if there is a hit, else 0
    * mrr: 1 / r of the first hit, 0 without a hit

    Args:
        hits: [num_users, num_recommended] bool; whether each recommendation, the best first, is relevant. Fewer than
            `k` only if there are fewer items.
        num_relevant: [num_users] int64, each at least 1.
        k: length of the lists.

    Returns:
        [4] float64, in the order of `NAMES`.

    Source: Zhao et al. 2021, "RecBole: towards a unified, comprehensive and efficient framework for
    recommendation algorithms", and its documentation of the metrics.
    """
    found = hits[:, :k].double()
    # A user may have more relevant items than can be recommended: some may be unknown to training.
    num_ideal = num_relevant.clamp(max=k)
    num_places = max([found.shape[1], *num_ideal.amax(dim=0, keepdim=True).tolist()])
    places = torch.arange(1, num_places + 1, dtype=torch.float64, device=hits.device)
    gains = 1.0 / torch.log2(places + 1)
    ideal = gains.cumsum(0)[num_ideal - 1]
    places, gains = places[: found.shape[1]], gains[: found.shape[1]]
    is_first = (found.cumsum(1) == 1) & (found == 1)
    return torch.stack(
        [
            (found.sum(1) / num_relevant).sum(),
            ((found * gains).sum(1) / ideal).sum(),
            found.amax(1).sum(),
            (is_first / places).sum(),
        ]
    )


def hits_of(recommended: Tensor, starts: Tensor, relevant: Tensor, num_items: int) -> Tensor:
    """Returns whether each recommendation is relevant to its user; [num_users, k] bool.

    Args:
        recommended: [num_users, k] int64 rows of items; -1 for none.
        starts: [num_users + 1] int64; index in `relevant` of each user's first item; the last entry is its length.
        relevant: [num_relevant] int64 rows of items, user by user; -1 for an item without a row.
        num_items: number of all items.
    """
    users = torch.arange(len(recommended))
    keys = torch.repeat_interleave(users, starts.diff()) * num_items + relevant
    return torch.isin(users.unsqueeze(1) * num_items + recommended, keys[relevant >= 0]) & (recommended >= 0)


def name_at(measure: str, k: int) -> str:
    """Returns the name under which a measure is logged, such as "recall@20"."""
    return f"{measure}@{k}"


def measure_names(ks: Sequence[int]) -> list[str]:
    """Returns the names of all measures of recommendation lists of the lengths `ks`."""
    return [name_at(name, k) for k in ks for name in (*NAMES, "item_coverage")]


def mean_measures(sums: Tensor, num_users: int, ks: Sequence[int]) -> dict[str, float]:
    """Returns the means over users by name, such as "recall@20".

    Args:
        sums: [len(ks), 4]; one result of `list_measures` per length.
        num_users: number of users in the sums.
        ks: lengths of the lists.
    """
    means = (sums / max(1, num_users)).tolist()
    return {name_at(n, k): value for k, row in zip(ks, means, strict=True) for n, value in zip(NAMES, row, strict=True)}
