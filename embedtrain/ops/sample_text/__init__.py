"""From a stretch of text to training examples: subsampling, windows and negatives, drawn by counters."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.sample_text import native, reference
from embedtrain.ops.sample_text.types import ALIAS_BITS, KEEP_BITS, SamplingTables, TextSample

__all__ = ["ALIAS_BITS", "KEEP_BITS", "SamplingTables", "TextSample", "sample_text"]


def sample_text(
    tokens: Tensor,
    positions: Tensor,
    tables: SamplingTables,
    *,
    window: int,
    num_negatives: int,
    key: int,
    parts: Tensor | None = None,
    num_kept: int | None = None,
) -> TextSample:
    """Subsamples a text, and draws a window and negatives for each word kept.

    The draws of a word are outputs `position * (1 + num_negatives)` and following of the splitmix64 stream of
    `key`: the first says whether it is kept (its high 24 bits) and how wide its window is (its low 32 bits), each of
    the others a column of a part's alias table (high 32 bits) and which of its two rows (low 32 bits). So what is drawn
    for a word depends on nothing but the key, its place in the text and its part.

    Args:
        tokens: [n] int32; a row, or ~row if a sentence begins there: windows end at sentence borders.
        positions: [n] int64; the tokens' places in the whole text.
        tables: thresholds of the draws.
        window: most words to each side; widths are uniform from 1 to this.
        num_negatives: drawn for each centre, by the alias table.
        key: of the stream, any 64-bit integer.
        parts: [n] int32; the part of the vocabulary that each token's negatives come from. None for the first part.
        num_kept: how many words are kept, if the caller knows: a GPU's host then does not wait to find out.

    Raises:
        ValueError: a token or a part is outside the tables, or shapes or dtypes disagree. On a GPU tokens and parts are
            the caller's promise: the host would have to wait for the device to look at them.

    Source: Steele, Lea, Flood 2014 (splitmix64); Walker's alias method.
    """
    if tokens.dtype != torch.int32 or positions.dtype != torch.int64 or tokens.shape != positions.shape:
        raise ValueError(
            f"expected tokens int32 and positions int64 of one shape, got {tokens.dtype} {tuple(tokens.shape)} "
            f"and {positions.dtype} {tuple(positions.shape)}"
        )
    if tokens.numel() and not tokens.is_cuda:
        low, high = (int(bound) for bound in torch.aminmax(tokens))
        num_rows = tables.keep.numel()
        if low < -num_rows or high >= num_rows:
            raise ValueError(f"tokens must be rows of a table of {num_rows} or their complement, got {low} to {high}")
    if parts is None:
        parts = torch.zeros_like(tokens)
    if parts.dtype != torch.int32 or parts.shape != tokens.shape:
        raise ValueError(f"expected parts int32 {tuple(tokens.shape)}, got {parts.dtype} {tuple(parts.shape)}")
    if parts.numel() and not parts.is_cuda:
        low, high = (int(bound) for bound in torch.aminmax(parts))
        num_parts = tables.part_starts.numel() - 1
        if low < 0 or high >= num_parts:
            raise ValueError(f"parts must be among the {num_parts} of the tables, got {low} to {high}")
    if dispatch.uses_native(tokens):
        return native.sample_text(tokens, positions, parts, tables, window, num_negatives, key)
    if dispatch.uses_triton(tokens):
        from embedtrain.ops.sample_text import triton

        return triton.sample_text(tokens, positions, parts, tables, window, num_negatives, key, num_kept)
    return reference.sample_text(tokens, positions, parts, tables, window, num_negatives, key)
