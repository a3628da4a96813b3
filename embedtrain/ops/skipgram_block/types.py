"""A block of text for the word2vec loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Architecture = Literal["skipgram", "cbow"]


@dataclass(frozen=True)
class TextBlock:
    """Holds a block of consecutive words with their windows and targets; positions count within the block.

    Attributes:
        inputs: [n] int64; the row of each word's input vector.
        targets: [n, 1 + k] int64; the row of each word's output vector, then the rows of its negatives' output vectors.
            The loss skips a negative that equals the word.
        starts: [n] int64; first position of each centre's window.
        stops: [n] int64; one past the last position of each centre's window. The window contains the centre, which is
            not a context of itself.
        reach: largest distance of a word from its window's centre; None if unknown. The GPU kernels need it, and
            computing it needs a device sync.
    """

    inputs: Tensor
    targets: Tensor
    starts: Tensor
    stops: Tensor
    reach: int | None = None

    @property
    def num_positions(self) -> int:
        """Number of words in the block."""
        return self.inputs.numel()
