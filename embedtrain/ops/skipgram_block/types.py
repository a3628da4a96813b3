"""A block of text for the loss of word2vec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Architecture = Literal["skipgram", "cbow"]


@dataclass(frozen=True)
class TextBlock:
    """A block of consecutive words and what is to be predicted in it; positions count within the block.

    Attributes:
        inputs: [n] int64; the row of each word's input vector.
        targets: [n, 1 + k] int64; where each word's own output vector lies, and those of the negatives drawn for it. A
            negative that is the word itself is left out.
        starts: [n] int64; first position of each centre's window.
        stops: [n] int64; one past the last; the centre itself lies inside and is no context of its own.
        reach: no window holds a word further than this from its centre; None if unknown. Kernels on a GPU
            need it, and would make the host wait to find it out.
    """

    inputs: Tensor
    targets: Tensor
    starts: Tensor
    stops: Tensor
    reach: int | None = None

    @property
    def num_positions(self) -> int:
        """Words of the block."""
        return self.inputs.numel()
