"""Types and index arithmetic for bags whose rows belong to several owners."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.ops.pool_rows import Bags


class SplitBags(NamedTuple):
    """Holds the bags of several features, split by the owners of their rows.

    A bag has one sum per owner that owns at least one of its rows. Bags are numbered consecutively over all features.

    Attributes:
        rows: [num_values] int32 or int64; local rows, ordered by owner and bag. The first row of each bag at an owner
            is stored as its bitwise complement, a negative number, so that the lengths need not be sent.
        weights: [num_values] float32, in the same order; None if no feature has weights.
        bag_of_sum: [num_sums] int64; the bag of each sum, ordered by owner and bag. On a GPU the tensor is longer, and
            its other elements are meaningless, because the exact length would need a device sync.
        id_counts: [num_owners] int64; number of ids per owner.
        sum_counts: [num_owners] int64; number of sums per owner.
    """

    rows: Tensor
    weights: Tensor | None
    bag_of_sum: Tensor
    id_counts: Tensor
    sum_counts: Tensor


def owner_and_bag(keys: Tensor, lengths: Tensor, num_local_rows: int) -> tuple[Tensor, Tensor]:
    """Returns the owner of each value, and `owner * num_bags + bag`, both [num_values] int64."""
    owner = torch.div(keys, num_local_rows, rounding_mode="floor")
    # In place, because new memory of this size costs more than the arithmetic.
    bag = torch.repeat_interleave(lengths, output_size=keys.numel())
    return owner, bag.add_(owner, alpha=max(lengths.numel(), 1))


def lengths_of(feature: Bags, device: torch.device) -> Tensor:
    """Returns the lengths of a feature's bags, [num_bags] int64."""
    if feature.lengths is None:
        return torch.ones(feature.num_values, dtype=torch.int64, device=device)
    return feature.lengths
