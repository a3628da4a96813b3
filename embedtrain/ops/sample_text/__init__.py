"""From a stretch of text to training examples: subsampling, windows and negatives, drawn by counters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch

KEEP_BITS = 24
"""Resolution of the probability that subsampling keeps a word."""
ALIAS_BITS = 32
"""Resolution of the probability that an alias column gives its own row."""


@dataclass(frozen=True)
class SamplingTables:
    """What the draws are compared with.

    Attributes:
        keep: [num_rows] int32; an occurrence of the row is kept with probability keep / 2**24.
        columns: [num_columns, 2] int64; alias tables of the parts of the vocabulary, one after the other. A column
            gives the row in its second place with probability own / 2**32 and another row otherwise: own are the
            high 32 bits of its first place, without a sign, the other row the low ones. They lie together because
            every draw reads them, at random.
        part_starts: [parts + 1] int64; where each part's columns begin, and their number.
    """

    keep: Tensor
    columns: Tensor
    part_starts: Tensor


@dataclass(frozen=True)
class TextSample:
    """The words that were kept and what is to be predicted from what; positions count within the sample.

    Attributes:
        words: [n] int64; rows of the kept words.
        targets: [n, 1 + k] int64; the word's own row and the negatives drawn for it, which it may be among.
        starts: [n] int64; first position of each centre's window.
        stops: [n] int64; one past the last.
    """

    words: Tensor
    targets: Tensor
    starts: Tensor
    stops: Tensor


def sample_text(
    tokens: Tensor,
    positions: Tensor,
    tables: SamplingTables,
    *,
    window: int,
    num_negatives: int,
    key: int,
    parts: Tensor | None = None,
) -> TextSample:
    """Subsamples a text, and draws a window and negatives for each word kept.

    The draws of a word are outputs `position * (1 + num_negatives)` and following of the splitmix64 stream of
    `key`: the first says whether it is kept (its high 24 bits) and how wide its window is (its low 32 bits), each of
    the others a column of a part's alias table (high 32 bits) and which of its two rows (low 32 bits). So what is drawn
    for a word depends on nothing but the key, its place in the text and its part.

    Args:
        tokens: [n] int32; a row, or ~row where a sentence begins: windows end at sentence borders.
        positions: [n] int64; the tokens' places in the whole text.
        tables: thresholds of the draws.
        window: most words to each side; widths are uniform from 1 to this.
        num_negatives: drawn for each centre, by the alias table.
        key: of the stream, any 64-bit integer.
        parts: [n] int32; from which part of the vocabulary each token's negatives are drawn. The first where None.

    Raises:
        ValueError: a token or a part is outside the tables, or shapes or dtypes disagree.

    Source: Steele, Lea, Flood 2014 (splitmix64); Walker's alias method.
    """
    if tokens.dtype != torch.int32 or positions.dtype != torch.int64 or tokens.shape != positions.shape:
        raise ValueError(
            f"expected tokens int32 and positions int64 of one shape, got {tokens.dtype} {tuple(tokens.shape)} "
            f"and {positions.dtype} {tuple(positions.shape)}"
        )
    if tokens.numel():
        low, high = (int(bound) for bound in torch.aminmax(tokens))
        num_rows = tables.keep.numel()
        if low < -num_rows or high >= num_rows:
            raise ValueError(f"tokens must be rows of a table of {num_rows} or their complement, got {low} to {high}")
    if parts is None:
        parts = torch.zeros_like(tokens)
    if parts.dtype != torch.int32 or parts.shape != tokens.shape:
        raise ValueError(f"expected parts int32 {tuple(tokens.shape)}, got {parts.dtype} {tuple(parts.shape)}")
    if parts.numel():
        low, high = (int(bound) for bound in torch.aminmax(parts))
        num_parts = tables.part_starts.numel() - 1
        if low < 0 or high >= num_parts:
            raise ValueError(f"parts must be among the {num_parts} of the tables, got {low} to {high}")
    if dispatch.uses_native(tokens):
        from embedtrain.ops.sample_text import native

        return native.sample_text(tokens, positions, parts, tables, window, num_negatives, key)
    from embedtrain.ops.sample_text import reference

    return reference.sample_text(tokens, positions, parts, tables, window, num_negatives, key)
