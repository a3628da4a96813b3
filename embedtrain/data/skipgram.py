"""Training batches for word vectors: subsampled blocks of text with windows and negatives."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_intdigest

from embedtrain.data.corpus import PreparedCorpus
from embedtrain.data.negatives import alias_table, part_vocabulary
from embedtrain.data.partition import StepPlan, block_order, num_steps, share_of_rank
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.sample_text import ALIAS_BITS, KEEP_BITS, SamplingTables, TextSample, sample_text

WORDS_AT_FIRST = 16384
"""Number of words of the first steps, if steps grow."""


@dataclass(frozen=True)
class SamplingOptions:
    """Says how a text becomes predictions; the default values are word2vec's.

    Attributes:
        window: largest number of words on each side; each centre draws its own width from 1 to `window`.
        negatives: number of negatives per centre.
        sample: occurrences of words above this share of the text are dropped at random; 0 keeps all.
        power: negatives are drawn with probability proportional to count ** power.
        negative_parts: number of parts of the vocabulary; each block of text draws its negatives from one part. See
            `part_vocabulary`. 1 draws from the whole vocabulary, as word2vec does.
    """

    window: int = 5
    negatives: int = 5
    sample: float = 1e-3
    power: float = 0.75
    negative_parts: int = 1


@dataclass(frozen=True)
class TextBatch:
    """Holds one rank's part of a step.

    Attributes:
        sample: the kept words with their windows and negatives.
        num_examples: number of words of the text in the batch, before subsampling.
        on_host: the same words and windows in host memory, without negatives; None if the sample is in host memory. The
            host reads sizes from it, because reading them from a GPU would need a device sync.
    """

    sample: TextSample
    num_examples: int
    on_host: TextSample | None = None

    @property
    def windows(self) -> TextSample:
        """The words and windows in host memory; negatives may be absent."""
        return self.sample if self.on_host is None else self.on_host

    def split(self, num_parts: int) -> list[TextBatch]:
        """Cuts the batch into `num_parts` batches of the same step. No window contains words on both sides of a cut."""
        sample, num_words = self.windows, self.windows.words.numel()
        places = torch.arange(1, max(num_words, 1))
        is_border = (sample.stops.cummax(0).values[:-1] <= places) & (
            sample.starts.flip(0).cummin(0).values.flip(0)[1:] >= places
        )
        borders = torch.cat([torch.zeros(1, dtype=torch.int64), places[is_border], torch.tensor([num_words])])
        wanted = torch.tensor([num_words * part // num_parts for part in range(num_parts + 1)])
        cuts = borders[torch.searchsorted(borders, wanted)].tolist()
        parts = []
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            on_host = None if self.on_host is None else _piece(self.on_host, start, stop)
            num_examples = len(share_of_rank(self.num_examples, number, num_parts))
            parts.append(TextBatch(_piece(self.sample, start, stop), num_examples, on_host))
        return parts


def _piece(sample: TextSample, start: int, stop: int) -> TextSample:
    words, targets, starts, stops = (
        tensor[start:stop] for tensor in (sample.words, sample.targets, sample.starts, sample.stops)
    )
    return TextSample(words, targets, starts - start, stops - start)


class TextSampler:
    """Draws which words of a text are kept, their windows and their negatives.

    Draws are functions of counters, so they are the same on a GPU and on a CPU. If the samples are on a GPU, the host
    draws the kept words and their windows too: so it knows their number without a device sync. This is cheap, because
    most draws are of negatives.

    Args:
        tables: sampling tables in host memory.
        options: sampling options.
        device: device of the samples; None for the CPU.
    """

    def __init__(self, tables: SamplingTables, options: SamplingOptions, device: torch.device | None = None) -> None:
        self._tables, self._options = tables, options
        is_on_host = device is None or device.type == "cpu"
        self._tables_on_device = None if device is None or is_on_host else tables.to(device)

    def __call__(self, tokens: Tensor, positions: Tensor, parts: Tensor | None = None, *, key: int) -> TextBatch:
        """Samples a text in host memory; see `sample_text`."""
        window, num_negatives = self._options.window, self._options.negatives
        tables = self._tables_on_device
        if tables is None:
            sample = sample_text(
                tokens, positions, self._tables, window=window, num_negatives=num_negatives, key=key, parts=parts
            )
            return TextBatch(sample, tokens.numel())
        # The first draw of each word has the counter that it has among those of its negatives.
        first_draws = positions * (1 + num_negatives)
        on_host = sample_text(tokens, first_draws, self._tables, window=window, num_negatives=0, key=key)
        device = tables.keep.device
        sample = sample_text(
            to_device(tokens, device),
            to_device(positions, device),
            tables,
            window=window,
            num_negatives=num_negatives,
            key=key,
            parts=None if parts is None else to_device(parts, device),
            num_kept=on_host.words.numel(),
        )
        return TextBatch(sample, tokens.numel(), on_host)


class TextBatches:
    """Returns the batches of one rank. A batch is a function of seed, epoch and step, so a checkpoint needs no state.

    Windows end at the borders of sentences and of blocks.

    The blocks of a step draw their negatives from the parts of the vocabulary in turn. If the number of ranks divides
    the number of parts, the blocks of a rank draw most negatives from rows that the rank owns. Negatives are most of
    the rows of a step, so fewer rows are exchanged. A block's part is as random as the block's position in the epoch.

    Args:
        corpus: the text.
        options: sampling options.
        block_words: number of words per block, before subsampling.
        blocks_per_step: number of blocks of a full step, over all ranks.
        seed: seed of the order of blocks and of all draws.
        rank: rank whose part of each step is returned.
        world_size: number of ranks that share the blocks of a step.
        device: device of the model; see `TextSampler`.
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
        device: torch.device | None = None,
    ) -> None:
        self._corpus = corpus
        self._block_words = block_words
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._plan = StepPlan(-(-corpus.num_tokens // block_words), blocks_per_step)
        tables = sampling_tables(corpus.vocabulary.counts, options)
        self._num_parts = len(tables.part_starts) - 1
        self._sampler = TextSampler(tables, options, device)
        self._epoch = -1
        self._order = np.zeros(0, np.int64)
        self._key = 0

    def grow_steps(self, growth: float | None) -> None:
        """Makes early steps shorter, but not shorter than `WORDS_AT_FIRST` words; see `StepPlan`.

        Call it before the first batch is drawn.
        """
        num_blocks, blocks_per_step = self._plan.num_blocks, self._plan.blocks_per_step
        at_first = -(-WORDS_AT_FIRST // self._block_words)
        self._plan = StepPlan(num_blocks, blocks_per_step, growth=growth, blocks_at_first=at_first)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch if all steps are full; the same on every rank."""
        return num_steps(self._plan.num_blocks, self._plan.blocks_per_step)

    @property
    def is_growing(self) -> bool:
        """See `GrowingBatches`."""
        return self._plan.is_growing

    def steps_of(self, epoch: int) -> int:
        """See `GrowingBatches`."""
        return self._plan.steps_of(epoch)

    def share_done(self, epoch: int, step: int) -> float:
        """See `GrowingBatches`."""
        return float(self._plan.blocks(epoch, step).start / self._plan.num_blocks)

    @property
    def examples_per_epoch(self) -> int:
        """Number of words of the text, before subsampling."""
        return self._corpus.num_tokens

    def batch(self, epoch: int, step: int) -> TextBatch:
        """Returns this rank's part of a step, which may have no words. Epochs and steps count from 0."""
        if self._epoch != epoch:
            self._begin_epoch(epoch)
        blocks = self._order[self._plan.blocks(epoch, step)]
        share = share_of_rank(len(blocks), self._rank, self._world_size)
        tokens, positions, lengths = self._read(blocks[share.start : share.stop])
        parts = self._parts(step, len(blocks))[share.start : share.stop].repeat(lengths)
        return self._sampler(*map(torch.from_numpy, (tokens, positions, parts)), key=self._key)

    def _parts(self, step: int, num_blocks: int) -> NDArray[np.int32]:
        """Returns the part of the vocabulary of each block of a step, over all ranks."""
        num_parts = self._num_parts
        # The random offset is less than one block. In short steps, which have fewer blocks than parts, it gives every
        # part a chance. In long steps it moves the borders of the parts by less than a block, so they stay at the
        # borders of the ranks' shares.
        offset = xxh3_64_intdigest(f"{self._key}/{step}".encode()) / 2.0**64
        parts = (np.arange(num_blocks) + offset) * num_parts / num_blocks
        return np.minimum(parts, num_parts - 1).astype(np.int32)

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order = block_order(self._plan.num_blocks, self._seed, epoch)
        digest = xxh3_64_intdigest(f"{self._seed}/draws/{epoch}".encode())
        self._key = digest - (1 << 63)  # a signed integer, as torch has them

    def _read(self, blocks: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Returns the tokens of the blocks, one after the other, their positions in the text, and the blocks' lengths.

        Only the last block of the text may be shorter than the others.
        """
        starts = blocks * self._block_words
        stops = np.minimum(starts + self._block_words, self._corpus.num_tokens)
        tokens = self._corpus.read(starts, stops)
        positions = (starts[:, None] + np.arange(self._block_words)).ravel()
        positions = positions[positions < self._corpus.num_tokens]
        lengths = stops - starts
        firsts = lengths.cumsum() - lengths
        tokens[firsts] = np.minimum(tokens[firsts], ~tokens[firsts])  # windows end where a block does
        return tokens, positions, lengths


def sampling_tables(counts: NDArray[np.int64], options: SamplingOptions) -> SamplingTables:
    """Returns the sampling tables of a vocabulary with these counts."""
    weights = counts.astype(np.float64) ** options.power
    parts = part_vocabulary(weights, options.negative_parts)
    bits = np.uint64(ALIAS_BITS)
    columns = []
    for part in parts:
        own, other = alias_table(part.weights)
        thresholds = np.rint(own * (1 << ALIAS_BITS)).astype(np.uint64)
        is_whole = thresholds >> bits > 0
        # A column that always gives its own row would need a threshold of 33 bits. Instead, both its rows are its own.
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
