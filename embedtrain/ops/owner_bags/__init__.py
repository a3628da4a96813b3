"""Bags whose rows lie at several owners: split by owner, joined there again, and the owners' sums added up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.owner_bags import native, reference
from embedtrain.ops.owner_bags.types import SplitBags
from embedtrain.ops.pool_rows import Bags

__all__ = ["SplitBags", "add_sums", "join_bags", "share_out", "split_bags"]


def split_bags(
    keys: Tensor, bags: Sequence[Bags], *, num_owners: int, num_local_rows: int, dtype: torch.dtype
) -> SplitBags:
    """Splits bags by the owners of their rows.

    Args:
        keys: [n] int64, `owner * num_local_rows + local row`, feature after feature and bag after bag.
        bags: the features; their values are n together. There may be none.
        num_owners: number of owners.
        num_local_rows: rows of each owner.
        dtype: of the rows, int32 or int64.

    Raises:
        ValueError: shapes or dtypes disagree, or the lengths of a feature do not add up to its values.
        IndexError: a key is of no owner. Other devices than CPUs do not look: the host would have to wait.
    """
    num_values = sum(feature.num_values for feature in bags)
    if keys.shape != (num_values,) or keys.dtype != torch.int64:
        raise ValueError(f"expected keys [{num_values}] int64, got {keys.dtype} {tuple(keys.shape)}")
    if dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows are int32 or int64, got {dtype}")
    run = native.split_bags if dispatch.uses_native(keys) else reference.split_bags
    return run(keys, bags, num_owners, num_local_rows, dtype)


def join_bags(rows: Tensor, num_bags: int) -> tuple[Tensor, Tensor]:
    """Returns the local rows [n] int64 and the lengths [num_bags] int64 of bags that were split.

    Args:
        rows: [n] int32 or int64; see `SplitBags.rows`.
        num_bags: how many bags begin in them.

    Raises:
        ValueError: another number of bags begins there. On a GPU it is the caller's promise.
    """
    run = native.join_bags if dispatch.uses_native(rows) else reference.join_bags
    return run(rows, num_bags)


def add_sums(parts: Sequence[Tensor], bag_of_sum: Tensor, bags: Sequence[Bags]) -> list[Tensor]:
    """Adds up the owners' sums of each bag in order of owner, and divides a mean by the bag's length.

    Args:
        parts: by owner its sums [n, dim], float32 or bfloat16.
        bag_of_sum: see `SplitBags`.
        bags: the features.

    Returns:
        Per feature [num_bags, dim] float32; zeros for an empty bag.

    Raises:
        ValueError: there are more or fewer sums.
    """
    if sum(len(part) for part in parts) != bag_of_sum.numel():
        raise ValueError(f"expected {bag_of_sum.numel()} sums, got {sum(len(part) for part in parts)}")
    run = native.add_sums if dispatch.uses_native(bag_of_sum) else reference.add_sums
    return run(parts, bag_of_sum, bags)


def share_out(grads: Sequence[Tensor | None], bags: Sequence[Bags], bag_of_sum: Tensor, out: Sequence[Tensor]) -> None:
    """Writes the gradient of each owner's sum of a bag.

    Args:
        grads: per feature [num_bags, dim] float32, the gradient of its pooled vectors; None if no gradient came back.
        bags: the features.
        bag_of_sum: see `SplitBags`.
        out: by owner [n, dim], float32 or bfloat16, written.

    Raises:
        ValueError: there is room for more or fewer gradients.
    """
    if sum(len(part) for part in out) != bag_of_sum.numel():
        raise ValueError(f"expected room for {bag_of_sum.numel()} gradients, got {sum(len(part) for part in out)}")
    run = native.share_out if dispatch.uses_native(bag_of_sum) else reference.share_out
    run(grads, bags, bag_of_sum, out)
