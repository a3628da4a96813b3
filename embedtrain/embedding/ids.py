"""Finds ids outside their tables before anything is sent, and treats them by the policy of their feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.errors import BadIdError
from embedtrain.jagged import Jagged
from embedtrain.ops._backend.mix import mix64
from embedtrain.spec import FeatureSpec


def faults_of(bags: Sequence[Jagged], num_outside: Tensor) -> Tensor:
    """Returns the number of faults in the ids and lengths of features on a device, a scalar int64 on the device.

    Args:
        bags: bags per feature.
        num_outside: [num_features] int64; number of ids outside the table.
    """
    wrong = [num_outside, *(feature.has_wrong_lengths().long()[None] for feature in bags if not feature.is_checked)]
    return torch.cat(wrong).sum()


def valid_bags(bags: Jagged, feature: FeatureSpec, num_rows: int, rank: int) -> Jagged:
    """Returns the bags with ids in `[0, num_rows)` only, by the feature's policy.

    Raises:
        BadIdError: an id is outside and the policy is "error".
        ValueError: the lengths of the bags were not yet checked, and are wrong.
    """
    if not bags.is_checked and bool(bags.has_wrong_lengths()):
        raise ValueError(
            f"feature {feature.name!r}: lengths must not be negative and must add up to the {bags.values.numel()} "
            f"values, got a sum of {int(bags.lengths.sum())} and a minimum of {int(bags.lengths.min())}"
        )
    ids = bags.values.long()
    if ids.numel() == 0:
        return bags
    low, high = torch.aminmax(ids)
    if int(low) >= 0 and int(high) < num_rows:
        return bags
    bad = (ids < 0) | (ids >= num_rows)
    if feature.invalid_ids == "error":
        raise BadIdError(_describe(bags, bad, feature, num_rows, rank))
    if feature.invalid_ids == "hash":
        return Jagged(torch.where(bad, mix64(ids).remainder(num_rows), ids), bags.lengths, bags.weights)
    return _without(bags, bad)


def _without(bags: Jagged, bad: Tensor) -> Jagged:
    dropped = torch.zeros_like(bags.lengths).index_add_(0, bags.bag_of_values(), bad.to(bags.lengths.dtype))
    weights = None if bags.weights is None else bags.weights[~bad]
    return Jagged(bags.values[~bad], bags.lengths - dropped, weights)


def _describe(bags: Jagged, bad: Tensor, feature: FeatureSpec, num_rows: int, rank: int) -> str:
    position = int(bad.nonzero()[0])
    return (
        f"feature {feature.name!r}, table {feature.table_name!r}: id {int(bags.values[position])} at position "
        f"{position} of the batch (bag {int(bags.bag_of_values()[position])}) on rank {rank} is outside the "
        f"table's range 0 to {num_rows - 1}; {int(bad.sum())} of {bad.numel()} ids are. "
        "Set the feature's invalid_ids to 'hash' or 'drop' to accept such ids."
    )
