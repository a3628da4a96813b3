"""Calls the native functions of the busiest rows."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.busiest_rows.reference import NUM_BUCKETS


def count_buckets(counts: Tensor, tables: Tensor, num_tables: int) -> Tensor:
    """See `embedtrain.ops.busiest_rows`."""
    counts, tables = counts.contiguous(), tables.contiguous()
    histogram = torch.zeros(num_tables, NUM_BUCKETS, dtype=torch.int64)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_count_buckets(
        counts.data_ptr(),
        tables.data_ptr(),
        counts.numel(),
        num_tables,
        histogram.data_ptr(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise library.outside_error("tables", tables, num_tables)
    return histogram


def busiest_rows(
    rows: Tensor, counts: Tensor, tables: Tensor, histogram: Tensor, number: int
) -> list[tuple[Tensor, Tensor]]:
    """See `embedtrain.ops.busiest_rows`."""
    rows, counts, tables = rows.contiguous(), counts.contiguous(), tables.contiguous()
    histogram = histogram.contiguous()
    num_rows, num_tables = counts.numel(), len(histogram)
    chosen_rows = empty_buffer(num_rows, dtype=torch.int64)
    chosen_counts = empty_buffer(num_rows)
    num_chosen = torch.empty(num_tables, dtype=torch.int64)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_busiest_rows(
        *(tensor.data_ptr() for tensor in (rows, counts, tables)),
        num_rows,
        histogram.data_ptr(),
        num_tables,
        number,
        *(tensor.data_ptr() for tensor in (chosen_rows, chosen_counts, num_chosen)),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise library.outside_error("tables", tables, num_tables)
    sizes = num_chosen.tolist()
    total = sum(sizes)
    return list(zip(chosen_rows[:total].split(sizes), chosen_counts[:total].split(sizes), strict=True))
