"""Iterating together where the ranks' data do not end together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist

from embedtrain.distributed.collectives import all_reduce_sum

T = TypeVar("T")


def lockstep(items: Iterable[T], group: dist.ProcessGroup | None) -> Iterator[T | None]:
    """Yields this rank's items, and None once they have run out, until those of every rank have.

    A rank that is given None takes part in the step with an empty batch: every rank makes the same number of
    steps, no item is left out, and nobody waits for a rank that has finished.

    Collective: every rank of `group` iterates to the end.
    """
    iterator = iter(items)
    while True:
        item = next(iterator, None)
        if all_reduce_sum(torch.tensor(float(item is not None)), group) == 0:
            return
        yield item
