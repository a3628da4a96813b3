"""Measures of recommendation lists; definitions as RecBole's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAMES = ("recall", "ndcg", "hit", "mrr")
"""Means over users; `item_coverage` is of all lists together."""


def list_measures(hits: Tensor, num_relevant: Tensor, k: int) -> Tensor:
    """Sums over the users what each one's list of the first `k` recommendations is worth.

    With `r` the places of the hits, from 1, and `n` the number of relevant items:

    * recall: hits / n
    * ndcg: sum of 1 / log2(r + 1) over the hits, divided by the same sum over the places 1 to min(n, k)
    * hit: whether there is any hit
    * mrr: 1 / r of the first hit, 0 without one

    Args:
        hits: [num_users, k or more, or as many as there are items] bool; whether each recommendation, the best first,
            is relevant.
        num_relevant: [num_users] int64, each at least 1.
        k: length of the list.

    Returns:
        [4] float64, in the order of `NAMES`.

    Source: Zhao et al. 2021, "RecBole: towards a unified, comprehensive and efficient framework for
    recommendation algorithms", and its documentation of the metrics.
    """
    found = hits[:, :k].double()
    # A user may have more relevant items than there are to recommend: some were never seen in training.
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
        starts: [num_users + 1] int64; where each user's relevant items begin.
        relevant: int64 rows of items; -1 for one that is never recommended.
        num_items: in all.
    """
    users = torch.arange(len(recommended))
    keys = torch.repeat_interleave(users, starts.diff()) * num_items + relevant
    return torch.isin(users.unsqueeze(1) * num_items + recommended, keys[relevant >= 0]) & (recommended >= 0)


def name_at(measure: str, k: int) -> str:
    """Returns the name under which a measure is logged: "recall@20"."""
    return f"{measure}@{k}"


def measure_names(ks: Sequence[int]) -> list[str]:
    """Returns the names of the measures of recommendations with lists of some lengths."""
    return [name_at(name, k) for k in ks for name in (*NAMES, "item_coverage")]


def mean_measures(sums: Tensor, num_users: int, ks: Sequence[int]) -> dict[str, float]:
    """Returns the means by name.

    Args:
        sums: [len(ks), 4], each row of `list_measures`.
    """
    means = (sums / max(1, num_users)).tolist()
    return {name_at(n, k): value for k, row in zip(ks, means, strict=True) for n, value in zip(NAMES, row, strict=True)}
