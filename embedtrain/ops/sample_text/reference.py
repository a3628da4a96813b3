"""Sampling of a text in plain PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend.mix import GOLDEN, mix64
from embedtrain.ops.sample_text.types import ALIAS_BITS, KEEP_BITS, SamplingTables, TextSample

_LOW_32 = (1 << 32) - 1


def sample_text(
    tokens: Tensor, positions: Tensor, parts: Tensor, tables: SamplingTables, window: int, num_negatives: int, key: int
) -> TextSample:
    """See `embedtrain.ops.sample_text`."""
    begins = tokens < 0
    rows = torch.where(begins, ~tokens, tokens).long()
    counters = positions * (1 + num_negatives)
    draws = _stream(key, counters)
    is_kept = ((draws >> (64 - KEEP_BITS)) & ((1 << KEEP_BITS) - 1)) < tables.keep[rows]
    width = 1 + (((draws & _LOW_32) * window) >> 32)
    words, sentences, width = rows[is_kept], begins.cumsum(0)[is_kept], width[is_kept]
    at = torch.arange(words.numel(), device=words.device)
    starts = torch.maximum(at - width, torch.searchsorted(sentences, sentences))
    stops = torch.minimum(at + width + 1, torch.searchsorted(sentences, sentences, right=True))
    draws = _stream(key, counters[is_kept].unsqueeze(1) + torch.arange(1, num_negatives + 1, device=words.device))
    part = parts[is_kept].long().unsqueeze(1)
    first, last = tables.part_starts[part], tables.part_starts[part + 1]
    found = tables.columns[first + ((((draws >> 32) & _LOW_32) * (last - first)) >> 32)]
    is_own = (draws & _LOW_32) < ((found[..., 0] >> ALIAS_BITS) & _LOW_32)
    negatives = torch.where(is_own, found[..., 1], found[..., 0] & _LOW_32)
    return TextSample(words, torch.cat([words.unsqueeze(1), negatives], dim=1), starts, stops)


def _stream(key: int, counters: Tensor) -> Tensor:
    return mix64(counters * GOLDEN + key)
