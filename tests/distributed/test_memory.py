"""What training holds beside the tables and their state: buffers of the size of a batch, however large the tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.shared_memory import SharedMemoryRanks
from embedtrain.testing.ranks import run_ranks

NUM_ROWS, DIM, NUM_IDS = 2_000_000, 64, 20_000
BATCH_BYTES = NUM_IDS * DIM * 4


def memory_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def bytes_of_others(ranks: Ranks) -> int:
    """Returns how many bytes of the other ranks' regions are mapped here; they are the other ranks' memory."""
    if not isinstance(ranks, SharedMemoryRanks):
        return 0
    own = ranks._gradients._own_address
    found, is_other = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            begin, end = (int(address, 16) for address in first.split("-"))
            is_other = "memfd:embedtrain" in line and not begin <= own < end
        elif first == "Rss:" and is_other:
            found += int(rest[0]) * 1024
    return found


def train(ranks: Ranks) -> tuple[int, int]:
    """Returns by how many bytes training raised the peak, and how many the tables and their state have."""
    rank = 0 if ranks is None else ranks.rank
    take_steps(*make(num_rows=10), 10, rank)  # code is mapped as it first runs
    tables, optimizer = make(NUM_ROWS)
    (rows,) = tables.table_groups
    held_bytes = sum(tensor.nbytes for tensor in (rows.weight, *rows.state.values()))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_bytes("VmRSS")
    take_steps(tables, optimizer, NUM_IDS, rank)
    return memory_bytes("VmHWM") - before - bytes_of_others(tables.ranks), held_bytes


def make(num_rows: int) -> tuple[et.EmbeddingCollection, et.optim.RowwiseAdagrad]:
    tables = et.EmbeddingCollection([et.TableSpec("item", num_rows, DIM)])
    return tables, et.optim.RowwiseAdagrad(tables, lr=0.1)


def take_steps(tables: et.EmbeddingCollection, optimizer: et.optim.RowwiseAdagrad, num_ids: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    (table,) = tables.shards.values()
    for _ in range(6):
        ids = torch.randint(0, table.spec.num_rows, (num_ids,), generator=generator)
        tables({"item": et.Jagged.from_ids(ids)})["item"].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_takes_batch_sized_buffers_only(world_size: int) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a process cannot be read here")
    # The allocator adds up to a quarter by chance, so the less of two tries counts.
    for (one_added, held_bytes), (other_added, _) in zip(
        *(run_ranks(world_size, train) for _ in range(2)), strict=True
    ):
        added_bytes = min(one_added, other_added)
        # Vectors and gradients on both sides of the exchange, what autograd keeps, and room for buffers' rounding up.
        assert added_bytes < 16 * BATCH_BYTES
        assert added_bytes < held_bytes / 2  # that a copy of the tables would not pass
