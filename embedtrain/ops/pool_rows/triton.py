"""Pooling on a GPU: one launch for the bags of all features, and one sum over sorted positions for the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops._backend.triton_launch import num_warps, on_device_of, power_of_2
from embedtrain.ops._backend.triton_runs import sum_runs
from embedtrain.ops.pool_rows.types import Bags
from embedtrain.ops.sort_unique import SortedKeys

_VALUES_AT_ONCE = 4


def pool_rows(source: Tensor, index: Tensor, bags: Sequence[Bags]) -> list[Tensor]:
    """See `embedtrain.ops.pool_rows`."""
    source, index = source.contiguous(), index.contiguous()
    dim = source.shape[1]
    num_bags = [feature.num_bags for feature in bags]
    total = sum(num_bags)
    pooled = torch.empty(total, dim, device=source.device)
    if total:
        lengths, weights = _lengths(bags, source.device), _weights(bags, source.device)
        divisors = _divisors(bags, source.device)
        columns = power_of_2(dim)
        with on_device_of(source):
            _pool_bag[(total,)](
                source,
                index,
                index if lengths is None else torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
                pooled if weights is None else weights,
                pooled if divisors is None else divisors,
                pooled,
                DIM=dim,
                HAS_LENGTHS=lengths is not None,
                HAS_WEIGHTS=weights is not None,
                HAS_DIVISORS=divisors is not None,
                VALUES=_VALUES_AT_ONCE,
                COLUMNS=columns,
                num_warps=num_warps(columns * _VALUES_AT_ONCE),
            )
    # Autograd does not treat `data` as a view, so the caller may change each tensor in place.
    return [part.data for part in pooled.split(num_bags)]


def pool_rows_backward(
    grads: Sequence[Tensor | None], bags: Sequence[Bags], keys: SortedKeys, dim: int, factor: float
) -> Tensor:
    """See `embedtrain.ops.pool_rows`."""
    device = keys.order.device
    of_bags = [
        torch.zeros(feature.num_bags, dim, device=device) if grad is None else grad
        for grad, feature in zip(grads, bags, strict=True)
    ]
    together = (of_bags[0] if len(of_bags) == 1 else torch.cat(of_bags)).contiguous()
    lengths, weights, divisors = _lengths(bags, device), _weights(bags, device), _divisors(bags, device)
    index = keys.order
    if lengths is not None or divisors is not None:
        num_bags = sum(feature.num_bags for feature in bags)
        bag = torch.arange(num_bags, device=device)
        if lengths is not None:
            # With the output size given, `repeat_interleave` needs no device sync.
            bag = torch.repeat_interleave(bag, lengths, output_size=index.numel())
        index = bag[index]
    factors = None if weights is None else weights[keys.order]
    if divisors is not None:
        factors = divisors[index].reciprocal() if factors is None else factors / divisors[index]
    return sum_runs(together, index, keys.starts, weights=factors, factor=factor, has_empty_runs=keys.is_padded)


def _lengths(bags: Sequence[Bags], device: torch.device) -> Tensor | None:
    """Returns [num_bags] int64 of all features; None if every bag holds one value."""
    if all(feature.lengths is None for feature in bags):
        return None
    ones = (torch.ones(feature.num_bags, dtype=torch.int64, device=device) for feature in bags)
    return torch.cat(
        [one if feature.lengths is None else feature.lengths for one, feature in zip(ones, bags, strict=True)]
    )


def _weights(bags: Sequence[Bags], device: torch.device) -> Tensor | None:
    """Returns [num_values] float32 of all features; None if no feature has weights."""
    if all(feature.weights is None for feature in bags):
        return None
    return torch.cat(
        [
            torch.ones(feature.num_values, device=device) if feature.weights is None else feature.weights
            for feature in bags
        ]
    )


def _divisors(bags: Sequence[Bags], device: torch.device) -> Tensor | None:
    """Returns the divisor of each bag's sum, [num_bags] float32; None if all divisors are 1."""
    if not any(feature.is_mean and feature.lengths is not None for feature in bags):
        return None
    return torch.cat(
        [
            feature.lengths.clamp(min=1).float()
            if feature.is_mean and feature.lengths is not None
            else torch.ones(feature.num_bags, device=device)
            for feature in bags
        ]
    )


@triton.jit
def _pool_bag(
    source,
    index,
    offsets,
    weights,
    divisors,
    pooled,
    DIM: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DIVISORS: tl.constexpr,
    VALUES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < DIM
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    first = bag
    last = bag + 1
    if HAS_LENGTHS:
        first = tl.load(offsets + bag)
        last = tl.load(offsets + bag + 1)
    for some in range(first, last, VALUES):
        value = some + tl.arange(0, VALUES)
        row = tl.load(index + value, mask=value < last, other=0)
        mask = (value < last)[:, None] & inside[None, :]
        vectors = tl.load(source + row[:, None] * DIM + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            vectors *= tl.load(weights + value, mask=value < last, other=0.0)[:, None]
        total += tl.sum(vectors, axis=0)
    if HAS_DIVISORS:
        total = tl.div_rn(total, tl.load(divisors + bag))
    tl.store(pooled + bag * DIM + column, total, mask=inside)
