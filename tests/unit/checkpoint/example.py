"""Tables to save, and ranks that are threads of the test's process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from embedtrain.checkpoint import ShardView, save_checkpoint
from embedtrain.distributed.ranks import Ranks
from embedtrain.testing.threads import outcomes_on_threads

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


def run_threads(world_size: int, function: Callable[[Ranks, int], T]) -> list[T | BaseException]:
    """Calls `function(ranks, rank)` on each rank; returns what each returned or raised."""
    return outcomes_on_threads(world_size, lambda ranks: function(ranks, ranks.rank))


def save(checkpoints_path: object, step: int, tables: Mapping[str, Tensor], world_size: int = 1, **options: Any) -> str:
    """Saves tables as `world_size` ranks do; raises what rank 0 raised."""
    state = options.pop("state", {"epoch": 1})

    def save_rank(ranks: Any, rank: int) -> str:
        shards = views_of(tables, rank, world_size)
        return save_checkpoint(str(checkpoints_path), step, shards, state, ranks, **options)

    outcome = run_threads(world_size, save_rank)[0]
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome
