"""A prepared text: its vocabulary, and its words as ids in memory-mapped files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from embedtrain.data.prepared import map_values, read_contents
from embedtrain.data.seal import FileName, Unverified
from embedtrain.data.vocabulary import Vocabulary
from embedtrain.schema import Count

VOCABULARY_NAME = "vocabulary.tsv"
TOKEN_DTYPE = np.dtype("<i4")


@dataclass(frozen=True)
class _Shard:
    name: FileName
    num_tokens: Count
    num_sentences: Count


@dataclass(frozen=True)
class _Meta:
    """The table of contents that `prepare_corpus` writes."""

    fingerprint: str
    shards: tuple[_Shard, ...]


class PreparedCorpus:
    """Opens the tokens of a prepared text, in the order of the text.

    A token is the row of a word in the vocabulary. A token that begins a sentence is stored as ~row, which is
    negative. The object is pickled by its path, so that workers of a data loader map the same files.

    Args:
        path: local folder that `prepare_corpus` wrote.
        unverified: see `prepared_entry`; includes the entries that the text was made from.

    Raises:
        ValueError: the table of contents is invalid.
        RuntimeError: a file does not have the size that it was written with.
    """

    def __init__(self, path: str, unverified: Unverified = ()) -> None:
        self.path = path
        self.unverified = unverified
        meta = read_contents(path, _Meta)
        self.fingerprint = meta.fingerprint
        self.num_sentences = sum(shard.num_sentences for shard in meta.shards)
        # Empty files cannot be memory-mapped.
        shards = [shard for shard in meta.shards if shard.num_tokens]
        self._shard_paths = [os.path.join(path, shard.name) for shard in shards]
        self._shard_starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])
        self.num_tokens = int(self._shard_starts[-1])

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the tokens."""
        return Vocabulary.load(os.path.join(self.path, VOCABULARY_NAME))

    def read(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> NDArray[np.int32]:
        """Returns a copy of the tokens of ranges [start, stop), one range after the other.

        Args:
            starts: [n]; first positions of the ranges.
            stops: [n]; one past the last positions.

        Returns:
            [sum of the ranges' lengths] int32.

        Raises:
            ValueError: a range is not inside [0, num_tokens].
        """
        outside = np.flatnonzero((starts < 0) | (starts > stops) | (stops > self.num_tokens))
        if len(outside):
            start, stop = starts[outside[0]], stops[outside[0]]
            raise ValueError(f"ranges must be inside [0, {self.num_tokens}], got [{start}, {stop})")
        tokens = np.empty((stops - starts).sum(), np.int32)
        shards = np.searchsorted(self._shard_starts, starts, side="right") - 1
        firsts = self._shard_starts.tolist()
        filled = 0
        for start, stop, shard in zip(starts.tolist(), stops.tolist(), shards.tolist(), strict=True):
            while start < stop:
                piece = self._shards[shard][start - firsts[shard] : stop - firsts[shard]]
                tokens[filled : filled + len(piece)] = piece
                filled += len(piece)
                start += len(piece)
                shard += 1
        return tokens

    def __reduce__(self) -> tuple[type[PreparedCorpus], tuple[str]]:
        return type(self), (self.path,)

    @cached_property
    def _shards(self) -> list[NDArray[np.int32]]:
        sizes = np.diff(self._shard_starts)
        return [map_values(path, TOKEN_DTYPE, int(size)) for path, size in zip(self._shard_paths, sizes, strict=True)]
