"""Initial values of tables, a function of seed, table name and slot: they do not depend on the world size."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from embedtrain.spec import TableSpec

_BLOCK_ROWS = 4096
"""Slots per generator. Changing it changes the initial values of every run with the same seed."""


def initial_rows(spec: TableSpec, start: int, stop: int, seed: int) -> Tensor:
    """Draws the initial values of the slots `[start, stop)`; [stop - start, dim], on the CPU, in the table's dtype.

    Slots are drawn in fixed blocks with one generator each, so that the values of a slot do not depend on the range.
    """
    rows = torch.zeros(stop - start, spec.dim, dtype=spec.dtype)
    if spec.init == "zeros":
        return rows
    for block_start in range(start - start % _BLOCK_ROWS, stop, _BLOCK_ROWS):
        block_stop = min(block_start + _BLOCK_ROWS, spec.num_rows)
        low, high = max(start, block_start), min(stop, block_stop)
        block = _draw_block(spec, block_start, block_stop, seed)
        rows[low - start : high - start] = block[low - block_start : high - block_start]
    return rows


def _draw_block(spec: TableSpec, start: int, stop: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(xxh3_64_intdigest(f"{seed}/{spec.name}/{start}".encode()))
    scale = 1.0 / math.sqrt(spec.dim) if spec.init_scale is None else spec.init_scale
    block = torch.empty(stop - start, spec.dim, dtype=torch.float32)
    if spec.init == "normal":
        return block.normal_(0.0, scale, generator=generator)
    return block.uniform_(-scale, scale, generator=generator)
