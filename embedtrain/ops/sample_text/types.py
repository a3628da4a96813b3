"""What the sampling of a text takes and gives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

KEEP_BITS = 24
"""Resolution of the probability that subsampling keeps a word."""

ALIAS_BITS = 32
"""Resolution of the probability that an alias column gives its own row."""


@dataclass(frozen=True)
class SamplingTables:
    """Tables that decide what a random draw means.

    Attributes:
        keep: [num_rows] int32; an occurrence of the row is kept with probability keep / 2**24.
        columns: [num_columns, 2] int64; alias tables of the parts of the vocabulary, one after the other. A column
            gives the row in its second place with probability own / 2**32 and another row otherwise: own are the
            high 32 bits of its first place, without a sign, the other row the low ones. They lie together because
            every draw reads them, at random.
        part_starts: [parts + 1] int64; the first column of each part, and the number of columns.
    """

    keep: Tensor
    columns: Tensor
    part_starts: Tensor

    def to(self, device: torch.device) -> SamplingTables:
        """Returns the tables on a device."""
        return SamplingTables(self.keep.to(device), self.columns.to(device), self.part_starts.to(device))


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
