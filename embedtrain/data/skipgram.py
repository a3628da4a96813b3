"""Training batches for word vectors: blocks of text, subsampled, with windows and negatives."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from embedtrain.data.corpus import PreparedCorpus
from embedtrain.data.negatives import alias_table, part_vocabulary
from embedtrain.data.partition import block_order, num_steps, share_of_rank
from embedtrain.ops.sample_text import ALIAS_BITS, KEEP_BITS, SamplingTables, TextSample, sample_text


@dataclass(frozen=True)
class SamplingOptions:
    """How a text becomes predictions; the defaults are word2vec's.

    Attributes:
        window: the most words to each side; each centre draws its own width from 1 to this.
        negatives: negative words for each centre.
        sample: words more frequent than this share of the text are dropped at random; 0 keeps all.
        power: negatives are drawn by count ** power.
        negative_parts: each block of text draws its negatives from one of so many parts of the vocabulary; see
            `part_vocabulary`. 1 draws from all, as word2vec does.
    """

    window: int = 5
    negatives: int = 5
    sample: float = 1e-3
    power: float = 0.75
    negative_parts: int = 1


@dataclass(frozen=True)
class TextBatch:
    """One rank's part of a step.

    Attributes:
        sample: the words kept, with windows and negatives.
        num_examples: words of the text that the batch covers, before subsampling.
    """

    sample: TextSample
    num_examples: int

    def split(self, num_parts: int) -> list[TextBatch]:
        """Returns the words as so many batches of the same step, cut where no window lies on both sides."""
        sample, num_words = self.sample, self.sample.words.numel()
        places = torch.arange(1, max(num_words, 1))
        is_border = (sample.stops.cummax(0).values[:-1] <= places) & (
            sample.starts.flip(0).cummin(0).values.flip(0)[1:] >= places
        )
        borders = torch.cat([torch.zeros(1, dtype=torch.int64), places[is_border], torch.tensor([num_words])])
        wanted = torch.tensor([num_words * part // num_parts for part in range(num_parts + 1)])
        cuts = borders[torch.searchsorted(borders, wanted)].tolist()
        parts = []
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            piece = TextSample(
                sample.words[start:stop],
                sample.targets[start:stop],
                sample.starts[start:stop] - start,
                sample.stops[start:stop] - start,
            )
            parts.append(TextBatch(piece, len(share_of_rank(self.num_examples, number, num_parts))))
        return parts


class TextBatches:
    """The batches of a rank, each a function of (seed, epoch, step): nothing to save, nothing to restore.

    Windows end at sentence borders and at the borders of a block.

    The blocks of a step draw their negatives from the parts of the vocabulary in turn, so that a rank's blocks draw
    most of theirs from rows that it owns, where the parts divide by the ranks: negatives are most of the rows of a
    step, and these need not travel. Which part a block meets is as random as its place in the epoch.

    Args:
        corpus: the text.
        options: sampling.
        block_words: words of the text in a block, before subsampling.
        blocks_per_step: blocks of a step over all ranks.
        seed: of the order and of every draw.
        rank: whose part of each step.
        world_size: ranks that share a step's blocks.
    """

    def __init__(
        self,
        corpus: PreparedCorpus,
        options: SamplingOptions,
        *,
        block_words: int,
        blocks_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._corpus = corpus
        self._options = options
        self._block_words = block_words
        self._blocks_per_step = blocks_per_step
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_blocks = -(-corpus.num_tokens // block_words)
        self._tables = sampling_tables(corpus.vocabulary.counts, options)
        self._epoch = -1
        self._order = np.zeros(0, np.int64)
        self._key = 0

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch, the same on every rank."""
        return num_steps(self._num_blocks, self._blocks_per_step)

    @property
    def examples_per_epoch(self) -> int:
        """Words of the text, before subsampling."""
        return self._corpus.num_tokens

    def batch(self, epoch: int, step: int) -> TextBatch:
        """Returns this rank's part of step `step` of epoch `epoch`, both from 0; it may hold no word."""
        if self._epoch != epoch:
            self._begin_epoch(epoch)
        blocks = self._order[step * self._blocks_per_step : (step + 1) * self._blocks_per_step]
        share = share_of_rank(len(blocks), self._rank, self._world_size)
        tokens, positions = self._read(blocks[share.start : share.stop])
        part_of_block = self._parts(step, len(blocks))[share.start : share.stop]
        sample = sample_text(
            torch.from_numpy(tokens),
            torch.from_numpy(positions),
            self._tables,
            window=self._options.window,
            num_negatives=self._options.negatives,
            key=self._key,
            parts=torch.from_numpy(np.repeat(part_of_block, self._block_words)[: len(tokens)]),
        )
        return TextBatch(sample, num_examples=len(tokens))

    def _parts(self, step: int, num_blocks: int) -> NDArray[np.int32]:
        """Returns the part of the vocabulary of each block of a step, over all ranks: all in turn, from anywhere on."""
        num_parts = len(self._tables.part_starts) - 1
        # Less than a block: whole blocks stay where the ranks divide them, and in short steps no part is left out.
        offset = xxh3_64_intdigest(f"{self._key}/{step}".encode()) / 2.0**64
        parts = (np.arange(num_blocks) + offset) * num_parts / num_blocks
        return np.minimum(parts, num_parts - 1).astype(np.int32)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = block_order(self._num_blocks, self._seed, epoch)
        digest = xxh3_64_intdigest(f"{self._seed}/draws/{epoch}".encode())
        self._key = digest - (1 << 63)  # a signed integer, as torch has them

    def _read(self, blocks: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Returns the tokens of the blocks, one after the other, and their places in the text."""
        starts = blocks * self._block_words
        positions = (starts[:, None] + np.arange(self._block_words)).ravel()
        if len(blocks) and starts.max() + self._block_words > self._corpus.num_tokens:
            positions = positions[positions < self._corpus.num_tokens]  # the text's last block
        tokens = np.empty(len(positions), np.int32)
        at = 0
        for start in starts.tolist():
            piece = self._corpus.read(start, min(start + self._block_words, self._corpus.num_tokens))
            if piece[0] >= 0:
                piece[0] = ~piece[0]  # windows end where a block does
            tokens[at : at + len(piece)] = piece
            at += len(piece)
        return tokens, positions


def sampling_tables(counts: NDArray[np.int64], options: SamplingOptions) -> SamplingTables:
    """Returns the thresholds of every draw for a vocabulary with these counts."""
    weights = counts.astype(np.float64) ** options.power
    parts = part_vocabulary(weights, options.negative_parts)
    bits = np.uint64(ALIAS_BITS)
    columns = []
    for part in parts:
        own, other = alias_table(part.weights)
        thresholds = np.rint(own * (1 << ALIAS_BITS)).astype(np.uint64)
        is_whole = thresholds >> bits > 0
        # A column that is all its own row's has no threshold in 32 bits, and needs none.
        thresholds[is_whole], other[is_whole] = 0, np.flatnonzero(is_whole)
        columns.append(
            np.stack([(thresholds << bits | part.rows[other].astype(np.uint64)).view(np.int64), part.rows], axis=1)
        )
    return SamplingTables(
        keep=torch.from_numpy(np.rint(keep_probabilities(counts, options.sample) * (1 << KEEP_BITS)).astype(np.int32)),
        columns=torch.from_numpy(np.concatenate(columns)),
        part_starts=torch.tensor([0, *itertools.accumulate(map(len, columns))]),
    )


def keep_probabilities(counts: NDArray[np.int64], sample: float) -> NDArray[np.float64]:
    """Returns the probability that subsampling keeps an occurrence of each word.

    With `f` the word's share of the text, `min(1, (sqrt(f / sample) + 1) * sample / f)`.

    Source: word2vec.c of Mikolov et al. 2013 (the paper's formula lacks the second term).
    """
    return keep_shares(counts / counts.sum(), sample)


def keep_shares(shares: NDArray[np.float64], sample: float) -> NDArray[np.float64]:
    """Returns `keep_probabilities` of words by their shares of the text."""
    if sample == 0:
        return np.ones(len(shares))
    ratio = shares / sample
    keep: NDArray[np.float64] = np.minimum(1.0, (np.sqrt(ratio) + 1) / ratio)
    return keep
