"""Bags whose rows belong to several owners: splits bags by owner, restores them there, and adds the owners' sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.owner_bags import native, reference
from embedtrain.ops.owner_bags.types import SplitBags, lengths_of, owner_and_bag
from embedtrain.ops.pool_rows import Bags

__all__ = ["SplitBags", "add_sums", "join_bags", "lengths_of", "owner_and_bag", "share_out", "split_bags"]


def split_bags(
    keys: Tensor, bags: Sequence[Bags], *, num_owners: int, num_local_rows: int, dtype: torch.dtype
) -> SplitBags:
    """Splits bags by the owners of their rows.

    Args:
        keys: [n] int64; `owner * num_local_rows + local row` for each value, ordered by feature and bag.
        bags: the features, with n values in total; may be empty.
        num_owners: number of owners.
        num_local_rows: number of rows per owner.
        dtype: dtype of the returned rows, int32 or int64.

    Raises:
        ValueError: shapes or dtypes disagree, or the lengths of a feature do not add up to its number of values.
        IndexError: a key belongs to no owner. Checked on CPUs only, because it would need a device sync.
    """
    num_values = sum(feature.num_values for feature in bags)
    if keys.shape != (num_values,) or keys.dtype != torch.int64:
        raise ValueError(f"expected keys [{num_values}] int64, got {keys.dtype} {tuple(keys.shape)}")
    if dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be int32 or int64, got {dtype}")
    run = native.split_bags if dispatch.uses_native(keys) else reference.split_bags
    return run(keys, bags, num_owners, num_local_rows, dtype)


def join_bags(rows: Tensor, num_bags: int) -> tuple[Tensor, Tensor]:
    """Restores bags at an owner from the encoding of `SplitBags.rows`.

    Args:
        rows: [n] int32 or int64; see `SplitBags.rows`.
        num_bags: number of bags in `rows`.

    Returns:
        rows: [n] int64; the local rows.
        lengths: [num_bags] int64; the lengths of the bags.

    Raises:
        ValueError: `rows` contains another number of bags. Not checked on a GPU.
    """
    run = native.join_bags if dispatch.uses_native(rows) else reference.join_bags
    return run(rows, num_bags)


def add_sums(parts: Sequence[Tensor], bag_of_sum: Tensor, bags: Sequence[Bags]) -> list[Tensor]:
    """Adds the owners' sums of each bag, in order of owner; for a mean, divides by the bag's length.

    Args:
        parts: one tensor of sums per owner, [n, dim] float32 or bfloat16.
        bag_of_sum: see `SplitBags`.
        bags: the features.

    Returns:
        One tensor per feature, [num_bags, dim] float32; zeros for an empty bag.

    Raises:
        ValueError: the number of sums differs from the length of `bag_of_sum`.
    """
    if sum(len(part) for part in parts) != bag_of_sum.numel():
        raise ValueError(f"expected {bag_of_sum.numel()} sums, got {sum(len(part) for part in parts)}")
    run = native.add_sums if dispatch.uses_native(bag_of_sum) else reference.add_sums
    return run(parts, bag_of_sum, bags)


def share_out(grads: Sequence[Tensor | None], bags: Sequence[Bags], bag_of_sum: Tensor, out: Sequence[Tensor]) -> None:
    """Writes the gradient of every sum, the backward of `add_sums`.

    Args:
        grads: one tensor per feature, [num_bags, dim] float32: the gradient of its pooled vectors. None stands for
            zeros.
        bags: the features.
        bag_of_sum: see `SplitBags`.
        out: one tensor per owner, [n, dim] float32 or bfloat16; receives the gradients.

    Raises:
        ValueError: the number of rows of `out` differs from the length of `bag_of_sum`.
    """
    if sum(len(part) for part in out) != bag_of_sum.numel():
        raise ValueError(f"expected room for {bag_of_sum.numel()} gradients, got {sum(len(part) for part in out)}")
    run = native.share_out if dispatch.uses_native(bag_of_sum) else reference.share_out
    run(grads, bags, bag_of_sum, out)
