"""The input and output types of text sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEEP_BITS = 24
"""Bits of the probability that subsampling keeps a word."""

ALIAS_BITS = 32
"""Bits of the probability that a column of an alias table gives its own row."""


@dataclass(frozen=True)
class SamplingTables:
    """Holds the tables that map random draws to decisions.

    Attributes:
        keep: [num_rows] int32; an occurrence of the row is kept with probability `keep / 2**24`.
        columns: [num_columns, 2] int64; the alias tables of all parts of the vocabulary, in order of part. The second
            element of a column is its own row. The first packs two numbers: a threshold in the high 32 bits (unsigned)
            and another row in the low 32 bits. A draw gives the own row with probability `threshold / 2**32`, else the
            other row. The three numbers are adjacent because every draw reads all of them at a random place.
        part_starts: [num_parts + 1] int64; the first column of each part, then the number of columns.
    """

    keep: Tensor
    columns: Tensor
    part_starts: Tensor

    def to(self, device: torch.device) -> SamplingTables:
        """Returns the tables on a device."""
        return SamplingTables(self.keep.to(device), self.columns.to(device), self.part_starts.to(device))


@dataclass(frozen=True)
class TextSample:
    """Holds the kept words with their windows and negatives; positions count within the sample.

    Attributes:
        words: [n] int64; rows of the kept words.
        targets: [n, 1 + k] int64; the word's own row, then its negatives. A negative may equal the word.
        starts: [n] int64; first position of each centre's window.
        stops: [n] int64; one past the last position of each centre's window.
    """

    words: Tensor
    targets: Tensor
    starts: Tensor
    stops: Tensor
