"""Calls the native skip-gram kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import buffer_for
from embedtrain.ops.skipgram_block.types import TextBlock


def skipgram_block(
    vectors: Tensor, block: TextBlock, factor: float, buffer: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """See `embedtrain.ops.skipgram_block`; returns None if an index or a window is out of range."""
    vectors = vectors.contiguous()
    inputs, targets = block.inputs.contiguous(), block.targets.contiguous()
    starts, stops = block.starts.contiguous(), block.stops.contiguous()
    loss = torch.zeros((), dtype=torch.float64)
    grad = buffer_for(buffer, *vectors.shape)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_skipgram_block(
        vectors.data_ptr(),
        *vectors.shape,
        *(tensor.data_ptr() for tensor in (inputs, targets, starts, stops)),
        *block.targets.shape,
        factor,
        loss.data_ptr(),
        grad.data_ptr(),
        ctypes.addressof(num_outside),
    )
    return None if num_outside.value else (loss, grad)


def count_of_rows(block: TextBlock, num_rows: int) -> Tensor:
    """See `embedtrain.ops.skipgram_block`; for skip-gram only."""
    inputs, targets = block.inputs.contiguous(), block.targets.contiguous()
    starts, stops = block.starts.contiguous(), block.stops.contiguous()
    counts = torch.empty(num_rows, dtype=torch.float32)
    num_outside = ctypes.c_int64()
    library.get().embedtrain_count_rows(
        *(tensor.data_ptr() for tensor in (inputs, targets, starts, stops)),
        *targets.shape,
        num_rows,
        counts.data_ptr(),
        ctypes.addressof(num_outside),
    )
    if num_outside.value:
        raise ValueError(f"{num_outside.value} indices lie outside the {num_rows} rows or outside the block")
    return counts
