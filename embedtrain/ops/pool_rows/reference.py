"""Pooling in plain PyTorch: gathers the rows, multiplies them by their weights and adds them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops.pool_rows.types import Bags
from embedtrain.ops.sort_unique import SortedKeys


def pool_rows(source: Tensor, index: Tensor, bags: Sequence[Bags]) -> list[Tensor]:
    """See `embedtrain.ops.pool_rows`."""
    pooled = []
    for feature, part in zip(bags, index.split([feature.num_values for feature in bags]), strict=True):
        vectors = source.index_select(0, part).float()
        if feature.weights is not None:
            vectors = vectors * feature.weights.unsqueeze(1)
        if feature.lengths is not None:
            sums = vectors.new_zeros(feature.num_bags, source.shape[1])
            vectors = sums.index_add_(0, bag_of_values(feature), vectors)
        pooled.append(_divided(vectors, feature))
    return pooled


def pool_rows_backward(
    grads: Sequence[Tensor | None], bags: Sequence[Bags], keys: SortedKeys, dim: int, factor: float = 1.0
) -> Tensor:
    """See `embedtrain.ops.pool_rows`."""
    per_value = [
        torch.zeros(feature.num_values, dim, dtype=torch.float32, device=keys.order.device)
        if grad is None
        else _of_values(grad, feature)
        for grad, feature in zip(grads, bags, strict=True)
    ]
    counts = keys.starts.diff()
    distinct = torch.repeat_interleave(torch.arange(counts.numel(), device=counts.device), counts)
    summed = torch.zeros(counts.numel(), dim, dtype=torch.float32, device=counts.device)
    summed.index_add_(0, distinct, torch.cat(per_value)[keys.order])
    return summed if factor == 1.0 else summed.mul_(factor)


def _of_values(grad: Tensor, feature: Bags) -> Tensor:
    values = _divided(grad, feature)
    if feature.lengths is not None:
        values = values[bag_of_values(feature)]
    return values if feature.weights is None else values * feature.weights.unsqueeze(1)


def _divided(vectors: Tensor, feature: Bags) -> Tensor:
    if not feature.is_mean or feature.lengths is None:
        return vectors
    return vectors / feature.lengths.clamp(min=1).unsqueeze(1)


def bag_of_values(feature: Bags) -> Tensor:
    """Returns the bag of each value, [num_values] int64."""
    if feature.lengths is None:
        return torch.arange(feature.num_values)
    return torch.repeat_interleave(torch.arange(feature.num_bags, device=feature.lengths.device), feature.lengths)
