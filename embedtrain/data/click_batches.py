"""Batches of a click log: functions of epoch and step, whose examples do not depend on the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedtrain.data.click_log import BAG_LENGTHS, DENSE, IDS, LABEL, ClickLayout, ClickLog, Records
from embedtrain.data.partition import block_order, num_steps, share_of_rank
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.errors import UserError
from embedtrain.jagged import Jagged


@dataclass(frozen=True)
class ClickBatch:
    """Holds one rank's examples of a step.

    Attributes:
        labels: [n] float32, 0 or 1.
        dense: [n, num_dense] float32, normalised; 0, the mean, if a number is missing.
        features: n bags of rows per categorical column.
        num_global: number of examples of the step over all ranks.
    """

    labels: Tensor
    dense: Tensor
    features: dict[str, Jagged]
    num_global: int

    @property
    def num_examples(self) -> int:
        """Number of examples of this rank."""
        return self.labels.numel()

    def split(self, num_parts: int) -> list[ClickBatch]:
        """Splits the examples into a number of micro-batches of the same step."""
        shares = [share_of_rank(self.num_examples, part, num_parts) for part in range(num_parts)]
        return [
            ClickBatch(
                self.labels[share.start : share.stop],
                self.dense[share.start : share.stop],
                {name: bags.part(share.start, share.stop) for name, bags in self.features.items()},
                self.num_global,
            )
            for share in shares
        ]


class ClickBatches:
    """Returns the batches of a rank as a function of (seed, epoch, step), without state to save.

    The log is cut into blocks of consecutive examples, which each epoch visits in a different order. The examples of a
    step are divided among the ranks.

    Args:
        log: the examples.
        examples_per_step: number of examples per step over all ranks.
        block_examples: number of examples per block; small blocks mix better, large blocks read faster from a disk.
        seed: seed of the order; None for the order of the log, as in an evaluation.
        ranks: the ranks among which a step is divided.
        on_epoch: called on every rank before an epoch's first batch is read, and when a run is resumed within one.

    Raises:
        UserError: a step is not a whole number of blocks.
    """

    def __init__(
        self,
        log: ClickLog,
        examples_per_step: int,
        *,
        block_examples: int = 32,
        seed: int | None = None,
        ranks: Ranks = ONE_PROCESS,
        on_epoch: Callable[[], None] | None = None,
    ) -> None:
        self._log = log
        if min(examples_per_step, block_examples) < 1 or examples_per_step % block_examples:
            raise UserError(
                f"examples_per_step must be a multiple of block_examples, got {examples_per_step} and {block_examples}"
            )
        self._block_examples = block_examples
        self._blocks_per_step = examples_per_step // block_examples
        self._num_blocks = -(-log.num_examples // self._block_examples)
        self._seed = seed
        self._rank, self._world_size = ranks.rank, ranks.size
        self._on_epoch = on_epoch
        self._epoch = -1
        self._order = np.zeros(0, np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch, the same on every rank; the last step may have fewer examples."""
        return num_steps(self._num_blocks, self._blocks_per_step)

    @property
    def examples_per_epoch(self) -> int:
        """Number of examples of the log."""
        return self._log.num_examples

    def batch(self, epoch: int, step: int) -> ClickBatch:
        """Returns this rank's batch of step `step` of epoch `epoch`, both from 0; it may be empty."""
        if self._epoch != epoch:
            self._begin_epoch(epoch)
        starts = self._order[step * self._blocks_per_step : (step + 1) * self._blocks_per_step] * self._block_examples
        stops = np.minimum(starts + self._block_examples, self._log.num_examples)
        ends = (stops - starts).cumsum()
        num_global = int(ends[-1]) if len(ends) else 0
        mine = share_of_rank(num_global, self._rank, self._world_size)
        # The part of each block that this rank gets.
        first = np.clip(mine.start - (ends - (stops - starts)), 0, stops - starts) + starts
        last = np.clip(mine.stop - (ends - (stops - starts)), 0, stops - starts) + starts
        pieces = [self._log.read(a, b) for a, b in zip(first.tolist(), last.tolist(), strict=True) if a < b]
        pieces = pieces or [self._log.read(0, 0)]
        records = Records(
            np.concatenate([piece.examples for piece in pieces]), np.concatenate([piece.values for piece in pieces])
        )
        return as_batch(records, self._log, num_global)

    def _begin_epoch(self, epoch: int) -> None:
        if self._on_epoch is not None:
            self._on_epoch()
        self._epoch = epoch
        in_order = np.arange(self._num_blocks)
        self._order = in_order if self._seed is None else block_order(self._num_blocks, self._seed, epoch)


def as_batch(records: Records, layout: ClickLayout, num_global: int) -> ClickBatch:
    """Returns this rank's examples as a batch of a step of `num_global` on all ranks."""
    examples = records.examples
    normalised = (examples[DENSE] - layout.dense_mean) / layout.dense_std
    ids = torch.from_numpy(examples[IDS].T.astype(np.int64))
    one_each = torch.ones(len(examples), dtype=torch.int64)
    features = {name: Jagged(ids[place], one_each) for place, name in enumerate(layout.single_names)}
    features |= _bags(records, layout.bag_names)
    return ClickBatch(
        labels=torch.from_numpy(np.ascontiguousarray(examples[LABEL])),
        dense=torch.from_numpy(np.nan_to_num(normalised).astype(np.float32)),
        features=features,
        num_global=num_global,
    )


def _bags(records: Records, names: Sequence[str]) -> dict[str, Jagged]:
    lengths: NDArray[np.int64] = records.examples[BAG_LENGTHS].astype(np.int64)
    bag_of_value = np.repeat(np.tile(np.arange(lengths.shape[1]), len(lengths)), lengths.ravel())
    return {
        name: Jagged(
            torch.from_numpy(records.values[bag_of_value == place].astype(np.int64)),
            torch.from_numpy(np.ascontiguousarray(lengths[:, place])),
        )
        for place, name in enumerate(names)
    }
