"""Sums over runs of sorted positions, in a fixed order and without atomics: equal inputs give equal bits.

The positions are cut into chunks of equal length, with one program per chunk. So a key with very many positions does
not delay the others. A run belongs to the chunk in which it begins. Each later chunk in which it continues writes a
partial sum to a row of its own, the chunk's head. A second kernel adds the heads to the run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops._backend.triton_launch import num_warps, on_device_of, power_of_2

_CHUNK = 32
_HEADS_AT_ONCE = 16


def sum_runs(
    values: Tensor,
    index: Tensor,
    starts: Tensor,
    *,
    weights: Tensor | None = None,
    factor: float = 1.0,
    has_empty_runs: bool = False,
) -> Tensor:
    """Adds up rows of `values` by run.

    Args:
        values: [num_values, dim] float32, contiguous.
        index: [n] int64; the row of `values` for each position.
        starts: [m + 1] int64; run j consists of the positions `starts[j]` to `starts[j + 1] - 1`. Positions from
            `starts[m]` on are in no run.
        weights: [n] float32; multiplies the row of each position. None for no weights.
        factor: multiplies every sum.
        has_empty_runs: whether runs may be empty; their sums are zero.

    Returns:
        [m, dim] float32.
    """
    m, n, dim = starts.numel() - 1, index.numel(), values.shape[1]
    if n == 0 or m == 0:
        return torch.zeros(m, dim, device=values.device)
    sums = (torch.zeros if has_empty_runs else torch.empty)(m, dim, device=values.device)
    num_chunks = triton.cdiv(n, _CHUNK)
    # The last run that begins at or before each chunk. If several runs begin there, all but the last are empty.
    begins = torch.arange(0, n, _CHUNK, device=starts.device)
    runs = torch.searchsorted(starts, begins, right=True).sub_(1)
    heads = torch.empty(num_chunks, dim, device=values.device)
    columns = power_of_2(dim)
    with on_device_of(values):
        _sum_chunk[(num_chunks,)](
            values,
            index,
            index if weights is None else weights,
            starts,
            runs,
            sums,
            heads,
            n,
            m,
            factor,
            DIM=dim,
            HAS_WEIGHTS=weights is not None,
            CHUNK=_CHUNK,
            COLUMNS=columns,
            num_warps=num_warps(columns * 2),
        )
        _add_heads[(num_chunks,)](
            starts,
            runs,
            sums,
            heads,
            num_chunks,
            m,
            factor,
            DIM=dim,
            CHUNK=_CHUNK,
            HEADS=_HEADS_AT_ONCE,
            COLUMNS=columns,
            num_warps=num_warps(columns * _HEADS_AT_ONCE),
        )
    return sums


@triton.jit(do_not_specialize=["n", "m"])
def _sum_chunk(
    values,
    index,
    weights,
    starts,
    runs,
    sums,
    heads,
    n,
    m,
    factor,
    DIM: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    last = tl.minimum(first + CHUNK, n)
    column = tl.arange(0, COLUMNS)
    inside = column < DIM
    run = tl.load(runs + chunk)
    if run < m:
        begin = tl.load(starts + run)
        end = tl.load(starts + run + 1)
        total = tl.zeros([COLUMNS], dtype=tl.float32)
        # Software pipelining: the next row is loaded before this one is added, and its index one row earlier.
        place = tl.load(index + first)
        row = tl.load(values + place * DIM + column, mask=inside, other=0.0)
        place = tl.load(index + tl.minimum(first + 1, last - 1))
        for position in range(first, last):
            next_row = tl.load(values + place * DIM + column, mask=inside, other=0.0)
            place = tl.load(index + tl.minimum(position + 2, last - 1))
            if (position == end) & (run < m):
                if begin < first:
                    tl.store(heads + chunk * DIM + column, total, mask=inside)
                else:
                    tl.store(sums + run * DIM + column, total * factor, mask=inside)
                total = tl.zeros([COLUMNS], dtype=tl.float32)
                begin = end
                while (end == begin) & (run < m):  # skips empty runs
                    run += 1
                    end = tl.load(starts + run + 1, mask=run < m, other=0)
            if run < m:
                if HAS_WEIGHTS:
                    row *= tl.load(weights + position)
                total += row
            row = next_row
        if run < m:
            if begin < first:
                tl.store(heads + chunk * DIM + column, total, mask=inside)
            else:
                tl.store(sums + run * DIM + column, total * factor, mask=inside)


@triton.jit(do_not_specialize=["num_chunks", "m"])
def _add_heads(
    starts,
    runs,
    sums,
    heads,
    num_chunks,
    m,
    factor,
    DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    HEADS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Adds the heads of later chunks to a run; the program of the run's second chunk does this for all of them."""
    chunk = tl.program_id(0).to(tl.int64)
    run = tl.load(runs + chunk)
    if run < m:
        begin = tl.load(starts + run)
        first = begin // CHUNK + 1
        if (begin < chunk * CHUNK) & (chunk == first):
            column = tl.arange(0, COLUMNS)
            inside = column < DIM
            last = (tl.load(starts + run + 1) - 1) // CHUNK + 1
            total = tl.zeros([COLUMNS], dtype=tl.float32)
            for some in range(first, last, HEADS):
                place = some + tl.arange(0, HEADS)
                mask = (place < last)[:, None] & inside[None, :]
                rows = tl.load(heads + place[:, None] * DIM + column[None, :], mask=mask, other=0.0)
                total += tl.sum(rows, axis=0)
            place = sums + run * DIM + column
            tl.store(place, tl.load(place, mask=inside, other=0.0) + total * factor, mask=inside)
