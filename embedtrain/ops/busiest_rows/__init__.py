"""The rows of each table with the largest counts, chosen alike on every number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.busiest_rows import native, reference
from embedtrain.ops.busiest_rows.reference import NUM_BUCKETS

__all__ = ["NUM_BUCKETS", "busiest_rows", "count_buckets"]


def count_buckets(counts: Tensor, tables: Tensor, num_tables: int) -> Tensor:
    """Returns the number of rows of each table by the bucket of their count. Bucket `b` begins at about 2**(b / 4).

    The histograms of ranks that own different rows can be summed.

    Args:
        counts: [n] float32; count of each row. Counts below 1 and above 2**32 are in the first and the last bucket.
        tables: [n] int64; index of each row's table.
        num_tables: number of tables.

    Returns:
        [num_tables, NUM_BUCKETS] int64.

    Raises:
        ValueError: shapes or dtypes disagree.
        IndexError: a table is out of range. Not checked on a GPU, because it would need a device sync.
    """
    _check(counts, tables)
    if dispatch.uses_native(counts):
        return native.count_buckets(counts, tables, num_tables)
    return reference.count_buckets(counts, tables, num_tables)


def busiest_rows(
    rows: Tensor, counts: Tensor, tables: Tensor, histogram: Tensor, number: int
) -> list[tuple[Tensor, Tensor]]:
    """Returns the rows of each table whose count is in one of its upper buckets.

    The buckets are the fewest that hold `number` rows by the histogram, or all if the table has fewer rows. So the
    choice depends neither on how equal counts are ordered nor on which rank owns a row.

    Args:
        rows: [n] int64.
        counts: [n] float32; count of each row.
        tables: [n] int64; index of each row's table.
        histogram: [num_tables, NUM_BUCKETS] int64; the sum of all ranks' `count_buckets`.
        number: least number of rows per table.

    Returns:
        Per table, the chosen rows [m] int64 and their counts [m] float32. On a GPU they are all rows, and the counts of
        rows that are not chosen are 0, because the host would have to wait for their number.

    Raises:
        ValueError: shapes or dtypes disagree.
        IndexError: a table is out of range. Not checked on a GPU, because it would need a device sync.
    """
    _check(counts, tables)
    if rows.shape != counts.shape or rows.dtype != torch.int64:
        raise ValueError(f"expected rows [{counts.numel()}] int64, got {rows.dtype} {tuple(rows.shape)}")
    if histogram.dim() != 2 or histogram.shape[1] != NUM_BUCKETS or histogram.dtype != torch.int64:
        raise ValueError(
            f"expected histogram [num_tables, {NUM_BUCKETS}] int64, got {histogram.dtype} {tuple(histogram.shape)}"
        )
    if dispatch.uses_native(counts):
        return native.busiest_rows(rows, counts, tables, histogram, number)
    return reference.busiest_rows(rows, counts, tables, histogram, number)


def _check(counts: Tensor, tables: Tensor) -> None:
    if counts.dim() != 1 or counts.dtype != torch.float32:
        raise ValueError(f"expected counts [n] float32, got {counts.dtype} {tuple(counts.shape)}")
    if tables.shape != counts.shape or tables.dtype != torch.int64:
        raise ValueError(f"expected tables [{counts.numel()}] int64, got {tables.dtype} {tuple(tables.shape)}")
