"""Bags whose rows lie at several owners."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SplitBags(NamedTuple):
    """The bags of several features by the owners of their rows.

    A bag has one sum per owner of any of its rows. Bags are numbered through all features.

    Attributes:
        rows: [num_values] int32 or int64; by owner and bag after bag the local rows. The first row of each bag there is
            stored as its complement, a negative number, so that lengths need not travel.
        weights: [num_values] float32, alike; None if no feature has weights.
        bag_of_sum: [num_sums] int64; by owner the bags that have rows there, ascending. On a GPU other numbers
            follow: the host would have to wait to know how many sums there are.
        id_counts: [num_owners] int64; ids for each owner.
        sum_counts: [num_owners] int64; sums of each owner.
    """

    rows: Tensor
    weights: Tensor | None
    bag_of_sum: Tensor
    id_counts: Tensor
    sum_counts: Tensor
