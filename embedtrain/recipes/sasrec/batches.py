"""Training batches of item sequences, in which each item predicts the next, and of sampled negatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_intdigest

from embedtrain.data.bags import Bags, spans
from embedtrain.data.negatives import alias_table, draw_rows
from embedtrain.data.partition import block_order, num_steps, random_generator, share_of_rank


@dataclass(frozen=True)
class SequenceBatch:
    """Holds one rank's part of a step, and the parts of the step that are equal on all ranks.

    Attributes:
        inputs: [m] int64 rows of items, sequence after sequence, shorter sequences first.
        targets: per rank, the items that follow its inputs, [m] int64.
        numbers: [num_sequences] int64; number of each sequence, unique in the step over all ranks.
        lengths: per rank, the lengths of its sequences, [num_sequences] int64.
        rank: this rank.
        candidates: [c] int64; the sampled negatives.
        shares: per rank, the range of the candidates that it looks up.
        log_expected: [c] float32; log of the expected count of each candidate among the candidates.
        dropout_key: key of the step's dropout masks.
        num_global_predictions: number of predictions of the step over all ranks.
    """

    inputs: Tensor
    targets: list[Tensor]
    numbers: Tensor
    lengths: list[NDArray[np.int64]]
    rank: int
    candidates: Tensor
    shares: list[range]
    log_expected: Tensor
    dropout_key: int
    num_global_predictions: int

    @property
    def num_examples(self) -> int:
        """Number of this rank's predictions."""
        return self.inputs.numel()

    def split(self, num_parts: int) -> list[SequenceBatch]:
        """Returns the sequences in `num_parts` batches of the same step, each with all negatives."""
        return [self._part(part, num_parts) for part in range(num_parts)]

    def _part(self, part: int, num_parts: int) -> SequenceBatch:
        starts = [np.cumsum(lengths) - lengths for lengths in self.lengths]
        positions = [
            torch.from_numpy(spans(start[part::num_parts], lengths[part::num_parts]))
            for start, lengths in zip(starts, self.lengths, strict=True)
        ]
        return replace(
            self,
            inputs=self.inputs[positions[self.rank]],
            targets=[own[places] for own, places in zip(self.targets, positions, strict=True)],
            numbers=self.numbers[part::num_parts],
            lengths=[own[part::num_parts] for own in self.lengths],
        )


@dataclass(frozen=True)
class BatchOptions:
    """Holds the sizes of steps and the sampling of negatives.

    Attributes:
        global_batch_size: approximate number of predictions per step over all ranks.
        max_length: maximum number of items from which a prediction is made.
        num_negatives: number of negatives drawn per step over all ranks; 0 for none.
        power: negatives are drawn with probability proportional to count ** power.
    """

    global_batch_size: int
    max_length: int
    num_negatives: int = 0
    power: float = 0.5


class SequenceBatches:
    """Makes the batches of a rank. Each batch is a function of (seed, epoch, step), so there is no state to save.

    An example is at most `max_length` items of a user, each of which predicts the next item. A longer history is split
    into several examples, from the newest item backwards. So every item except a user's first is predicted once per
    epoch. A step consists of whole examples, so that its number of predictions varies by the length of one example.

    Args:
        sequences: items of each user, the newest last.
        num_items: number of all items.
        options: sizes and negatives.
        seed: seed of the order and of all draws.
        rank: this rank.
        world_size: number of ranks that share a step.
        on_epoch: called on every rank before the first batch of an epoch, and when a run resumes within an epoch.
    """

    def __init__(
        self,
        sequences: Bags,
        num_items: int,
        options: BatchOptions,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        on_epoch: Callable[[], None] | None = None,
    ) -> None:
        self._values = sequences.values
        self._options, self._seed = options, seed
        self._rank, self._world_size = rank, world_size
        self._on_epoch = on_epoch
        self._firsts, self._lengths = _windows(sequences, options.max_length)
        # Items that training does not have are drawn too, with a count of 1.
        counts = np.bincount(sequences.values, minlength=num_items).clip(min=1).astype(np.float64)
        weights = counts**options.power
        self._alias_table = alias_table(weights)
        self._log_expected = np.log(max(1, options.num_negatives) * weights / weights.sum()).astype(np.float32)
        self._epoch = -1
        self._order = np.zeros(0, np.int64)
        self._bounds = np.zeros(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch, the same on every rank."""
        return num_steps(self.examples_per_epoch, self._options.global_batch_size)

    @property
    def examples_per_epoch(self) -> int:
        """Number of predictions in an epoch."""
        return int(self._lengths.sum())

    def batch(self, epoch: int, step: int) -> SequenceBatch:
        """Returns this rank's part of step `step` of epoch `epoch`, both from 0; may have no sequence."""
        if epoch != self._epoch:
            self._begin_epoch(epoch)
        chosen = self._order[self._bounds[step] : self._bounds[step + 1]]
        chosen = chosen[np.argsort(self._lengths[chosen], kind="stable")]
        # Sequences sorted by length are assigned in turn, so that all ranks have about equally many predictions.
        shares = [chosen[rank :: self._world_size] for rank in range(self._world_size)]
        inputs = [spans(self._firsts[share], self._lengths[share]) for share in shares]
        generator = random_generator(self._seed, "negatives", epoch, step)
        candidates = draw_rows(generator, self._options.num_negatives, self._alias_table)
        return SequenceBatch(
            inputs=self._items(inputs[self._rank]),
            targets=[self._items(places + 1) for places in inputs],
            numbers=torch.arange(self._rank, len(chosen), self._world_size),
            lengths=[self._lengths[share] for share in shares],
            rank=self._rank,
            candidates=torch.from_numpy(candidates),
            shares=[share_of_rank(len(candidates), rank, self._world_size) for rank in range(self._world_size)],
            log_expected=torch.from_numpy(self._log_expected[candidates]),
            dropout_key=_signed(xxh3_64_intdigest(f"{self._seed}/dropout/{epoch}/{step}".encode())),
            num_global_predictions=int(self._lengths[chosen].sum()),
        )

    def _items(self, places: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(self._values[places].astype(np.int64))

    def _begin_epoch(self, epoch: int) -> None:
        if self._on_epoch is not None:
            self._on_epoch()
        self._epoch = epoch
        self._order = block_order(len(self._lengths), self._seed, epoch)
        ends = np.cumsum(self._lengths[self._order])
        starts = ends - self._lengths[self._order]
        size = self._options.global_batch_size
        steps = np.arange(self.steps_per_epoch + 1)
        # Leaves at least one example for each later step: the last example may begin before the last step does.
        at_most = len(starts) - steps[::-1]
        self._bounds = np.minimum(np.searchsorted(starts, steps * size), at_most)


def _windows(sequences: Bags, max_length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the index of each example's first input in the values, and its number of inputs."""
    stops = sequences.starts[1:] - 1  # the newest item of a user is only a target
    num_inputs = np.diff(sequences.starts) - 1
    num_windows = np.maximum(-(-num_inputs // max_length), 0)
    back = spans(np.zeros_like(num_windows), num_windows) * max_length
    user = np.repeat(np.arange(len(num_windows)), num_windows)
    lengths = np.minimum(num_inputs[user] - back, max_length)
    return stops[user] - back - lengths, lengths


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
