"""Training batches for word vectors: blocks of text, subsampled, with windows and negatives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.corpus import PreparedCorpus
from embedtrain.data.negatives import NegativeSampler
from embedtrain.data.partition import block_order, num_steps, random_generator, share_of_rank


@dataclass(frozen=True)
class SamplingOptions:
    """How a text becomes predictions; the defaults are word2vec's.

    Attributes:
        window: the most words to each side; each centre draws its own width from 1 to this.
        negatives: negative words for each centre.
        sample: words more frequent than this share of the text are dropped at random; 0 keeps all.
        power: negatives are drawn by count ** power.
    """

    window: int = 5
    negatives: int = 5
    sample: float = 1e-3
    power: float = 0.75


@dataclass(frozen=True)
class TextBatch:
    """One rank's part of a step; positions count within the batch.

    Attributes:
        words: [n] int64; rows of the words that subsampling kept.
        negatives: [n, k] int64; rows drawn for each centre, -1 where the centre itself was drawn.
        starts: [n] int64; first position of each centre's window.
        stops: [n] int64; one past the last.
        num_words: words of the text that the batch covers, before subsampling.
    """

    words: Tensor
    negatives: Tensor
    starts: Tensor
    stops: Tensor
    num_words: int


class TextBatches:
    """The batches of a rank, each a function of (seed, epoch, step): nothing to save, nothing to restore.

    Windows end at sentence borders and at the borders of a block.

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
        counts = corpus.vocabulary.counts
        self._keep = keep_probabilities(counts, options.sample)
        self._sampler = NegativeSampler(counts, options.power)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch, the same on every rank."""
        return num_steps(self._num_blocks, self._blocks_per_step)

    @property
    def words_per_epoch(self) -> int:
        """Words of the text, before subsampling."""
        return self._corpus.num_tokens

    def batch(self, epoch: int, step: int) -> TextBatch:
        """Returns this rank's part of step `step` of epoch `epoch`, both from 0; it may hold no word."""
        if self._order[0] != epoch:
            self._order = (epoch, block_order(self._num_blocks, self._seed, epoch))
        blocks = self._order[1][step * self._blocks_per_step : (step + 1) * self._blocks_per_step]
        share = share_of_rank(len(blocks), self._rank, self._world_size)
        parts = [self._block(epoch, int(blocks[i])) for i in share]
        return _join(parts, self._options.negatives)

    def _block(self, epoch: int, block: int) -> TextBatch:
        start = block * self._block_words
        stop = min(start + self._block_words, self._corpus.num_tokens)
        tokens = self._corpus.read(start, stop)
        generator = random_generator(self._seed, "block", epoch, block)
        # A token that begins a sentence is stored as ~row.
        begins = tokens < 0
        rows = np.where(begins, ~tokens, tokens).astype(np.int64)
        kept = generator.random(len(rows), dtype=np.float32) < self._keep[rows]
        words, sentences = rows[kept], np.cumsum(begins, dtype=np.int64)[kept]
        width = generator.integers(1, self._options.window + 1, len(words))
        starts, stops = window_bounds(sentences, width)
        negatives = self._sampler.draw(generator, (len(words), self._options.negatives))
        negatives[negatives == words[:, None]] = -1
        return TextBatch(
            words=torch.from_numpy(words),
            negatives=torch.from_numpy(negatives),
            starts=torch.from_numpy(starts),
            stops=torch.from_numpy(stops),
            num_words=stop - start,
        )


def keep_probabilities(counts: NDArray[np.int64], sample: float) -> NDArray[np.float32]:
    """Returns the probability that subsampling keeps an occurrence of each word.

    With `f` the word's share of the text, `min(1, (sqrt(f / sample) + 1) * sample / f)`.

    Source: word2vec.c of Mikolov et al. 2013 (the paper's formula lacks the second term).
    """
    if sample == 0:
        return np.ones(len(counts), np.float32)
    ratio = counts / counts.sum() / sample
    keep: NDArray[np.float32] = np.minimum(1.0, (np.sqrt(ratio) + 1) / ratio).astype(np.float32)
    return keep


def window_bounds(
    sentences: NDArray[np.int64], width: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns each position's window [start, stop): its width to both sides, inside its own sentence.

    Args:
        sentences: [n] ascending; the sentence of each word.
        width: [n]; words to each side.
    """
    positions = np.arange(len(sentences))
    first_of_sentence = np.searchsorted(sentences, sentences, side="left")
    end_of_sentence = np.searchsorted(sentences, sentences, side="right")
    return np.maximum(positions - width, first_of_sentence), np.minimum(positions + width + 1, end_of_sentence)


def _join(parts: list[TextBatch], num_negatives: int) -> TextBatch:
    """Lays blocks one after the other; their windows stay apart."""
    if not parts:
        none = torch.zeros(0, dtype=torch.int64)
        return TextBatch(none, none.view(0, num_negatives), none, none, 0)
    if len(parts) == 1:
        return parts[0]
    offsets = np.cumsum([0, *(part.words.numel() for part in parts[:-1])]).tolist()
    return TextBatch(
        words=torch.cat([part.words for part in parts]),
        negatives=torch.cat([part.negatives for part in parts]),
        starts=torch.cat([part.starts + offset for part, offset in zip(parts, offsets, strict=True)]),
        stops=torch.cat([part.stops + offset for part, offset in zip(parts, offsets, strict=True)]),
        num_words=sum(part.num_words for part in parts),
    )
