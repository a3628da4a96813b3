"""Tables to save, and ranks that are threads of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from embedtrain.checkpoint import ShardView, agreement, save_checkpoint, writer

T = TypeVar("T")

LAYOUT = {"kind": "spread", "multiplier": 8}


def example_tables(num_rows: int = 37, dim: int = 5, seed: int = 0) -> dict[str, Tensor]:
    """Returns two tables and a float32 state, with different numbers of rows, one of them 3."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "item/weight": torch.randn(num_rows, dim, generator=generator),
        "item/accumulator": torch.rand(num_rows, generator=generator),
        "word/weight": torch.randn(3, 4, generator=generator).to(torch.bfloat16),
    }


def views_of(tables: Mapping[str, Tensor], rank: int = 0, world_size: int = 1) -> list[ShardView]:
    """Returns a rank's part of each table: views that share memory with it."""
    views = []
    for name, table in tables.items():
        chunk = -(-len(table) // world_size)
        start = min(rank * chunk, len(table))
        rows = table[start : start + chunk]
        views.append(ShardView(name, tuple(table.shape), start, rows, LAYOUT))
    return views


class ThreadGroup:
    """Stands where a process group does, for ranks that are threads."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.thread = threading.local()
        self._changed = threading.Condition()
        self._gathered: dict[int, dict[int, Any]] = {}
        self._is_broken = False

    def join(self, rank: int) -> None:
        self.thread.rank, self.thread.num_collectives = rank, 0

    def gather(self, value: Any) -> list[Any]:
        with self._changed:
            values = self._gathered.setdefault(self.thread.num_collectives, {})
            self.thread.num_collectives += 1
            values[self.thread.rank] = value
            self._changed.notify_all()
            self._changed.wait_for(lambda: len(values) == self.size or self._is_broken, timeout=10)
            if len(values) < self.size:
                raise ConnectionError("Connection closed by peer")
            return [values[rank] for rank in range(self.size)]

    def leave(self) -> None:
        """Fails what the others wait for, as the closed connections of a dead rank do."""
        with self._changed:
            self._is_broken = True
            self._changed.notify_all()


@contextmanager
def _thread_collectives() -> Iterator[None]:
    with (
        mock.patch.object(agreement, "all_gather_object", lambda value, group: group.gather(value)),
        mock.patch.object(agreement, "rank_of", lambda group: group.thread.rank),
        mock.patch.object(agreement, "size_of", lambda group: group.size),
        mock.patch.object(writer, "rank_of", lambda group: group.thread.rank),
        mock.patch.object(writer, "size_of", lambda group: group.size),
    ):
        yield


def run_threads(world_size: int, function: Callable[[Any, int], T]) -> list[T | BaseException]:
    """Calls `function(group, rank)` on each rank; returns what each returned or raised."""
    group = ThreadGroup(world_size)
    outcomes: list[Any] = [None] * world_size

    def run(rank: int) -> None:
        group.join(rank)
        try:
            outcomes[rank] = function(group, rank)
        except BaseException as error:
            outcomes[rank] = error
            group.leave()

    with _thread_collectives():
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return outcomes


def save(checkpoints_path: object, step: int, tables: Mapping[str, Tensor], world_size: int = 1, **options: Any) -> str:
    """Saves tables as `world_size` ranks do; raises what rank 0 raised."""
    state = options.pop("state", {"epoch": 1})

    def save_rank(group: Any, rank: int) -> str:
        shards = views_of(tables, rank, world_size)
        return save_checkpoint(str(checkpoints_path), step, shards, state, group, **options)

    outcome = run_threads(world_size, save_rank)[0]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
