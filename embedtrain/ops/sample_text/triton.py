"""Sampling of a text on a GPU: each program handles a tile of tokens, because no draw depends on another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedtrain.ops._backend.triton_launch import on_device_of, power_of_2
from embedtrain.ops._backend.triton_rounding import mix64
from embedtrain.ops.sample_text.types import SamplingTables, TextSample

_TOKENS_AT_ONCE = 128
_LOW_32 = (1 << 32) - 1


def sample_text(
    tokens: Tensor,
    positions: Tensor,
    parts: Tensor,
    tables: SamplingTables,
    window: int,
    num_negatives: int,
    key: int,
    num_kept: int | None = None,
) -> TextSample:
    """See `embedtrain.ops.sample_text`."""
    tokens, positions, parts = tokens.contiguous(), positions.contiguous(), parts.contiguous()
    num_tokens, device = tokens.numel(), tokens.device
    if num_tokens == 0:
        none = torch.zeros(0, dtype=torch.int64, device=device)
        return TextSample(none, none.view(0, 1 + num_negatives), none, none)
    # Triton chooses an integer's type by its value. Two 32-bit halves have the same type for every key, so no key
    # triggers a new compilation.
    halves = _signed_32(key), _signed_32(key >> 32)
    widths = torch.empty(num_tokens, dtype=torch.int32, device=device)
    num_programs = triton.cdiv(num_tokens, _TOKENS_AT_ONCE)
    with on_device_of(tokens):
        _draw_widths[(num_programs,)](
            tokens, positions, tables.keep, widths, *halves, num_tokens, window, num_negatives, TOKENS=_TOKENS_AT_ONCE
        )
    ends = (widths > 0).cumsum(0)
    sentence_of_token = (tokens < 0).cumsum(0)
    n = int(ends[-1]) if num_kept is None else num_kept
    words, sentences, width = torch.empty(3, n, dtype=torch.int64, device=device)
    targets = torch.empty(n, 1 + num_negatives, dtype=torch.int64, device=device)
    with on_device_of(tokens):
        _write_kept[(num_programs,)](
            tokens,
            positions,
            parts,
            widths,
            ends,
            sentence_of_token,
            tables.columns,
            tables.part_starts,
            words,
            targets,
            sentences,
            width,
            *halves,
            num_tokens,
            n,
            NEGATIVES=num_negatives,
            SLOTS=power_of_2(max(num_negatives, 1)),
            TOKENS=_TOKENS_AT_ONCE,
        )
    at = torch.arange(n, device=device)
    starts = torch.maximum(at - width, torch.searchsorted(sentences, sentences))
    stops = torch.minimum(at + width + 1, torch.searchsorted(sentences, sentences, right=True))
    return TextSample(words, targets, starts, stops)


def _signed_32(value: int) -> int:
    """Returns the low 32 bits as a signed integer."""
    low = value & _LOW_32
    return low - (1 << 32) if low >> 31 else low


@triton.jit
def _stream(key_low, key_high, counters):
    """Returns the outputs of a key's splitmix64 stream for int64 counters."""
    key = (key_high.to(tl.int64) << 32) | (key_low.to(tl.int64) & 0xFFFFFFFF)
    return mix64((counters * -7046029254386353131 + key).to(tl.uint64, bitcast=True))


@triton.jit(do_not_specialize=["key_low", "key_high", "num_tokens", "window", "num_negatives"])
def _draw_widths(
    tokens,
    positions,
    keep,
    widths,
    key_low,
    key_high,
    num_tokens,
    window,
    num_negatives,
    TOKENS: tl.constexpr,
):
    """Draws the width of each word's window; 0 for a word that is not kept."""
    place = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = place < num_tokens
    token = tl.load(tokens + place, mask=inside, other=0)
    row = tl.where(token < 0, -1 - token, token)
    counters = tl.load(positions + place, mask=inside, other=0) * (num_negatives.to(tl.int64) + 1)
    draw = _stream(key_low, key_high, counters)
    is_kept = (draw >> 40).to(tl.int64) < tl.load(keep + row, mask=inside, other=0).to(tl.int64)
    width = 1 + (((draw & 0xFFFFFFFF) * window.to(tl.uint64)) >> 32).to(tl.int32)
    tl.store(widths + place, tl.where(is_kept, width, 0), mask=inside)


@triton.jit(do_not_specialize=["key_low", "key_high", "num_tokens", "num_kept"])
def _write_kept(
    tokens,
    positions,
    parts,
    widths,
    ends,
    sentence_of_token,
    columns,
    part_starts,
    words,
    targets,
    sentences,
    width_of_word,
    key_low,
    key_high,
    num_tokens,
    num_kept,
    NEGATIVES: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Draws the negatives of each kept word, and writes the word and its negatives to their places in the result."""
    place = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = place < num_tokens
    width = tl.load(widths + place, mask=inside, other=0)
    at = tl.load(ends + place, mask=inside, other=0) - 1
    # The second condition prevents writes outside the result if the caller's `num_kept` is wrong.
    is_kept = (width > 0) & (at < num_kept)
    token = tl.load(tokens + place, mask=is_kept, other=0)
    row = tl.where(token < 0, -1 - token, token).to(tl.int64)
    tl.store(words + at, row, mask=is_kept)
    tl.store(targets + at * (1 + NEGATIVES), row, mask=is_kept)
    tl.store(width_of_word + at, width.to(tl.int64), mask=is_kept)
    tl.store(sentences + at, tl.load(sentence_of_token + place, mask=is_kept, other=0), mask=is_kept)
    part = tl.load(parts + place, mask=is_kept, other=0)
    first = tl.load(part_starts + part, mask=is_kept, other=0)
    part_size = (tl.load(part_starts + part + 1, mask=is_kept, other=1) - first).to(tl.uint64, bitcast=True)
    counter = tl.load(positions + place, mask=is_kept, other=0) * (1 + NEGATIVES) + 1
    negative = tl.arange(0, SLOTS)
    mask = is_kept[:, None] & (negative < NEGATIVES)[None, :]
    draw = _stream(key_low, key_high, counter[:, None] + negative[None, :].to(tl.int64))
    column = first[:, None] + (((draw >> 32) * part_size[:, None]) >> 32).to(tl.int64, bitcast=True)
    shared = tl.load(columns + 2 * column, mask=mask, other=0).to(tl.uint64, bitcast=True)
    own = tl.load(columns + 2 * column + 1, mask=mask, other=0)
    other_row = (shared & 0xFFFFFFFF).to(tl.int64, bitcast=True)
    drawn = tl.where((draw & 0xFFFFFFFF) < (shared >> 32), own, other_row)
    tl.store(targets + at[:, None] * (1 + NEGATIVES) + 1 + negative[None, :], drawn, mask=mask)
