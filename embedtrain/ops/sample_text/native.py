"""Calls the native sampling kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops._backend.row_memory import empty_buffer
from embedtrain.ops.sample_text.types import SamplingTables, TextSample


def sample_text(
    tokens: Tensor, positions: Tensor, parts: Tensor, tables: SamplingTables, window: int, num_negatives: int, key: int
) -> TextSample:
    """See `embedtrain.ops.sample_text`."""
    tokens, positions, parts = tokens.contiguous(), positions.contiguous(), parts.contiguous()
    num_tokens = tokens.numel()
    words, starts, stops = empty_buffer(3, num_tokens, dtype=torch.int64)
    targets = empty_buffer(num_tokens, 1 + num_negatives, dtype=torch.int64)
    num_kept = torch.zeros((), dtype=torch.int64)
    library.get().embedtrain_sample_text(
        tokens.data_ptr(),
        positions.data_ptr(),
        parts.data_ptr(),
        num_tokens,
        tables.keep.data_ptr(),
        tables.columns.data_ptr(),
        tables.part_starts.data_ptr(),
        window,
        num_negatives,
        key,
        *(result.data_ptr() for result in (words, targets, starts, stops, num_kept)),
    )
    n = int(num_kept)
    return TextSample(words[:n], targets[:n], starts[:n], stops[:n])
