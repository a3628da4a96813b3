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


def share_of_rank(num_items: int, rank: int, world_size: int) -> range:
    """Returns the items of a step that `rank` works on: consecutive, and as even as they divide.

    The first ranks take one item more where they do not divide; ranks beyond the items get none.
    """
    share, rest = divmod(num_items, world_size)
    start = rank * share + min(rank, rest)
    return range(start, start + share + (rank < rest))
