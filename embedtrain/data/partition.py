"""Who trains on what, and when: pure functions of seed, epoch and step, so that a run resumes from a number.

A text is cut into blocks of consecutive words. Each epoch visits the blocks in an order of its own, and a
step takes the next few of them; the ranks share a step's blocks. So the order of the data does not depend on
the number of ranks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest


def random_generator(*key: int | str) -> np.random.Generator:
    """Returns a generator whose draws are a function of the key alone, such as (seed, purpose, epoch)."""
    digest = xxh3_64_intdigest("/".join(map(str, key)).encode())
    return np.random.Generator(np.random.Philox(key=digest))


def block_order(num_blocks: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Returns the order in which an epoch visits the blocks: a permutation, [num_blocks]."""
    return random_generator(seed, "block order", epoch).permutation(num_blocks)


def num_steps(num_blocks: int, blocks_per_step: int) -> int:
    """Returns the steps of an epoch; the last one may have fewer blocks than the others."""
    return -(-num_blocks // blocks_per_step)


class StepPlan:
    """Cuts the blocks of each epoch into steps, which may grow with what was trained on.

    Large steps lose quality at the beginning of a run, while rows have hardly left their first values. A step then has
    at most the share `growth` of the blocks so far, over all epochs, but at least `blocks_at_first`.

    Args:
        num_blocks: of an epoch.
        blocks_per_step: of a full step; the last one of an epoch may have fewer.
        growth: the share; None for full steps from the first on.
        blocks_at_first: of the first steps, if they grow; never more than of a full one.
    """

    def __init__(
        self, num_blocks: int, blocks_per_step: int, *, growth: float | None = None, blocks_at_first: int = 1
    ) -> None:
        self.num_blocks, self.blocks_per_step = num_blocks, blocks_per_step
        self._growth, self._at_first = growth, max(min(blocks_at_first, blocks_per_step), 1)
        self._starts: dict[int, list[int]] = {}

    @property
    def is_growing(self) -> bool:
        """Whether any step is shorter than a full one because of its place in the run."""
        return self._growth is not None and self._at_first < self.blocks_per_step

    def steps_of(self, epoch: int) -> int:
        """Returns the steps of an epoch."""
        starts = self._growing_starts(epoch)
        return num_steps(self.num_blocks, self.blocks_per_step) if starts is None else len(starts)

    def blocks(self, epoch: int, step: int) -> slice:
        """Returns the places in the epoch's order of the blocks of a step, both from 0."""
        starts = self._growing_starts(epoch)
        if starts is None:
            return slice(step * self.blocks_per_step, min((step + 1) * self.blocks_per_step, self.num_blocks))
        ends = [*starts[1:], self.num_blocks]
        return slice(starts[step], ends[step])

    def _growing_starts(self, epoch: int) -> list[int] | None:
        """Returns where the steps of an epoch start; None if all are full ones."""
        if self._growth is None or not self.is_growing:
            return None
        before = epoch * self.num_blocks
        if int(self._growth * before) >= self.blocks_per_step:
            return None
        if epoch not in self._starts:
            starts, at = [], 0
            while at < self.num_blocks:
                starts.append(at)
                at += min(self.blocks_per_step, max(self._at_first, int(self._growth * (before + at))))
            self._starts[epoch] = starts
        return self._starts[epoch]


def share_of_rank(num_items: int, rank: int, world_size: int) -> range:
    """Returns the items of a step that `rank` works on: consecutive, and as even as they divide.

    The first ranks take one item more where they do not divide; ranks beyond the items get none.
    """
    share, rest = divmod(num_items, world_size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))
