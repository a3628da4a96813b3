"""Samples training examples from a text: subsampling, windows and negatives, with counter-based random numbers."""

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
    """Subsamples a text, and draws a window and negatives for each word that is kept.

    The random draws of a word are consecutive outputs of the splitmix64 stream of `key`, from output number
    `position * (1 + num_negatives)` on. The first output decides whether the word is kept (high 24 bits) and how wide
    its window is (low 32 bits). Each other output draws one negative: a column of the part's alias table (high 32 bits)
    and one of the column's two rows (low 32 bits). So the draws of a word depend only on the key, the word's position
    in the text and its part.

    Args:
        tokens: [n] int32; a row, or its complement `~row` if a sentence begins there. Windows end at sentence borders.
        positions: [n] int64; positions of the tokens in the whole text.
        tables: subsampling thresholds and alias tables.
        window: largest number of words on each side. Widths are uniform in 1 to `window`.
        num_negatives: number of negatives per centre.
        key: key of the random stream, any 64-bit integer.
        parts: [n] int32; the part of the vocabulary from which each token's negatives are drawn. None for the first
            part.
        num_kept: number of kept words, if the caller knows it. On a GPU this saves a device sync.

    Raises:
        ValueError: a token or a part is out of range, or shapes or dtypes disagree. Ranges are not checked on a GPU,
            because it would need a device sync.

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
            raise ValueError(f"tokens must be rows below {num_rows} or their complements, got {low} to {high}")
    if parts is None:
        parts = torch.zeros_like(tokens)
    if parts.dtype != torch.int32 or parts.shape != tokens.shape:
        raise ValueError(f"expected parts int32 {tuple(tokens.shape)}, got {parts.dtype} {tuple(parts.shape)}")
    if parts.numel() and not parts.is_cuda:
        low, high = (int(bound) for bound in torch.aminmax(parts))
        num_parts = tables.part_starts.numel() - 1
        if low < 0 or high >= num_parts:
            raise ValueError(f"parts must lie in [0, {num_parts}), got {low} to {high}")
    if dispatch.uses_native(tokens):
        return native.sample_text(tokens, positions, parts, tables, window, num_negatives, key)
    if dispatch.uses_triton(tokens):
        from embedtrain.ops.sample_text import triton

        return triton.sample_text(tokens, positions, parts, tables, window, num_negatives, key, num_kept)
    return reference.sample_text(tokens, positions, parts, tables, window, num_negatives, key)
