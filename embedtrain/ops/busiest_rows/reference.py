"""The busiest rows in plain PyTorch, also on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import library

_BUCKETS_PER_OCTAVE = 4
NUM_BUCKETS = 32 * _BUCKETS_PER_OCTAVE


def count_buckets(counts: Tensor, tables: Tensor, num_tables: int) -> Tensor:
    """See `embedtrain.ops.busiest_rows`."""
    _check(tables, num_tables)
    histogram = torch.zeros(num_tables * NUM_BUCKETS, dtype=torch.int64, device=counts.device)
    histogram.index_add_(0, tables * NUM_BUCKETS + _buckets(counts), torch.ones_like(tables))
    return histogram.view(num_tables, NUM_BUCKETS)


def busiest_rows(
    rows: Tensor, counts: Tensor, tables: Tensor, histogram: Tensor, number: int
) -> list[tuple[Tensor, Tensor]]:
    """See `embedtrain.ops.busiest_rows`."""
    _check(tables, len(histogram))
    at_or_above = histogram.flip(1).cumsum(1).flip(1)
    lowest = ((at_or_above >= number).sum(dim=1) - 1).clamp(min=0)
    is_busy = _buckets(counts) >= lowest[tables]
    chosen = []
    for table in range(histogram.shape[0]):
        is_own = is_busy & (tables == table)
        if counts.is_cuda:
            chosen.append((rows, counts * is_own))
        else:
            chosen.append((rows[is_own], counts[is_own]))
    return chosen


def _check(tables: Tensor, num_tables: int) -> None:
    if not tables.is_cuda and tables.numel() and not 0 <= tables.min() <= tables.max() < num_tables:
        raise library.outside_error("tables", tables, num_tables)


def _buckets(counts: Tensor) -> Tensor:
    """Returns the bucket of each count, [n] int64: the float's exponent and two bits of its mantissa."""
    one = 127 * _BUCKETS_PER_OCTAVE
    return ((counts.contiguous().view(torch.int32) >> 21).long() - one).clamp(0, NUM_BUCKETS - 1)
