"""Splitting bags by owner in plain PyTorch, by sorting pairs of owner and bag; runs on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops.owner_bags.types import SplitBags, lengths_of, owner_and_bag
from embedtrain.ops.pool_rows import Bags, pool_rows


def split_bags(
    keys: Tensor, bags: Sequence[Bags], num_owners: int, num_local_rows: int, dtype: torch.dtype
) -> SplitBags:
    """See `embedtrain.ops.owner_bags`."""
    num_bags = sum(feature.num_bags for feature in bags)
    lengths = torch.cat([keys.new_zeros(0), *(lengths_of(feature, keys.device) for feature in bags)])
    owner, pairs = owner_and_bag(keys, lengths, num_local_rows)
    # No size depends on the number of distinct pairs, because that would need a device sync.
    ascending, order = torch.sort(pairs, stable=True)
    is_first = torch.ones_like(ascending, dtype=torch.bool)
    torch.ne(ascending[1:], ascending[:-1], out=is_first[1:])
    rows = torch.sub(keys, owner, alpha=num_local_rows)[order]
    rows = torch.where(is_first, ~rows, rows)
    weights = None
    if any(feature.weights is not None for feature in bags):
        of_values = [
            keys.new_ones(feature.num_values, dtype=torch.float32) if feature.weights is None else feature.weights
            for feature in bags
        ]
        weights = torch.cat(of_values)[order]
    ends = torch.searchsorted(ascending, torch.arange(num_owners + 1, device=keys.device) * num_bags)
    sums_before = torch.nn.functional.pad(is_first.cumsum(0), (1, 0))
    bag_of_sum = torch.zeros_like(ascending)
    bag_of_sum.scatter_(0, sums_before[1:] - 1, ascending % max(num_bags, 1))
    if not keys.is_cuda:
        bag_of_sum = bag_of_sum[: int(sums_before[-1])]
    return SplitBags(rows.to(dtype), weights, bag_of_sum, ends.diff(), sums_before[ends].diff())


def join_bags(rows: Tensor, num_bags: int) -> tuple[Tensor, Tensor]:
    """See `embedtrain.ops.owner_bags`."""
    signed = rows.long()
    is_first = signed < 0
    if not rows.is_cuda and int(is_first.sum()) != num_bags:
        raise ValueError(f"expected {num_bags} bags, got {int(is_first.sum())}")
    lengths = _occurrences(is_first.cumsum(0) - 1, num_bags)
    return torch.where(is_first, ~signed, signed), lengths


def add_sums(parts: Sequence[Tensor], bag_of_sum: Tensor, bags: Sequence[Bags]) -> list[Tensor]:
    """See `embedtrain.ops.owner_bags`."""
    num_bags = [feature.num_bags for feature in bags]
    sums = torch.cat(list(parts))
    order = torch.sort(bag_of_sum, stable=True).indices
    num_owners = _occurrences(bag_of_sum, sum(num_bags))
    factors = _factors(bags, sums.device)
    weights = None if factors is None else factors[bag_of_sum[order]]
    (pooled,) = pool_rows(sums, order, [Bags(sums.shape[0], num_owners, weights)])
    # Autograd does not treat `data` as a view, so the caller may change one feature's vectors in place.
    return [part.data for part in pooled.split(num_bags)]


def share_out(grads: Sequence[Tensor | None], bags: Sequence[Bags], bag_of_sum: Tensor, out: Sequence[Tensor]) -> None:
    """See `embedtrain.ops.owner_bags`."""
    no_rows = torch.zeros(0, out[0].shape[1], dtype=torch.float32, device=bag_of_sum.device)
    of_bags = torch.cat(
        [
            no_rows,
            *(
                no_rows.new_zeros(feature.num_bags, out[0].shape[1]) if grad is None else grad
                for feature, grad in zip(bags, grads, strict=True)
            ),
        ]
    )
    factors = _factors(bags, bag_of_sum.device)
    weights = None if factors is None else factors[bag_of_sum]
    (shared,) = pool_rows(of_bags, bag_of_sum, [Bags(bag_of_sum.numel(), None, weights)])
    for part, own in zip(out, shared.split([len(part) for part in out]), strict=True):
        part.copy_(own)


def _occurrences(numbers: Tensor, num_numbers: int) -> Tensor:
    """Returns how often each number below `num_numbers` occurs, [num_numbers] int64, without a device sync."""
    counts = torch.zeros(num_numbers, dtype=torch.int64, device=numbers.device)
    return counts.scatter_add_(0, numbers, torch.ones_like(numbers))


def _factors(bags: Sequence[Bags], device: torch.device) -> Tensor | None:
    """Returns the factor of each bag's sum, [num_bags] float32; None if all factors are 1."""
    if not any(feature.is_mean for feature in bags):
        return None
    parts = []
    for feature in bags:
        lengths = lengths_of(feature, device)
        parts.append(1.0 / lengths.clamp(min=1).float() if feature.is_mean else torch.ones_like(lengths).float())
    return torch.cat(parts)
