"""The exchange through shared memory: the same rows as the process group's, and no waiting for the dead."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from embedtrain.distributed.collectives import all_to_all_rows
from embedtrain.distributed.shared_memory import VARIABLE, connect
from embedtrain.ops.dispatch import cpu_backend
from embedtrain.testing.ranks import run_ranks

# Rows from rank s to rank r in round n: none, a few, and more than a ring holds.
SIZES = [0, 3, 700, 40_000]
DTYPES = [torch.float32, torch.bfloat16, torch.int64]


def rows_between(sender: int, receiver: int, number: int) -> torch.Tensor:
    count = SIZES[(sender + 2 * receiver + number) % len(SIZES)]
    dtype = DTYPES[number % len(DTYPES)]
    generator = torch.Generator().manual_seed(100 * sender + 10 * receiver + number)
    return torch.randint(-99, 99, (count, 37), generator=generator).to(dtype)


def exchange_rounds(group: dist.ProcessGroup) -> bool:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    os.environ[VARIABLE] = "1"
    shared = connect(group, torch.device("cpu"))
    if shared is None:
        return False
    for number in range(8):
        outgoing = [rows_between(rank, receiver, number) for receiver in range(size)]
        expected = [rows_between(sender, rank, number) for sender in range(size)]
        counts = [[len(rows) for rows in side] for side in (outgoing, expected)]
        for way in (shared, None):
            received = all_to_all_rows(torch.cat(outgoing), counts[0], counts[1], group, way)
            assert torch.equal(received, torch.cat(expected))
    return True


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_arrive_as_through_the_process_group(world_size: int) -> None:
    if cpu_backend() != "native":
        pytest.skip("the native library was not built")
    before = set(os.listdir("/dev/shm"))
    assert all(run_ranks(world_size, exchange_rounds))
    left = {name for name in set(os.listdir("/dev/shm")) - before if name.startswith("embedtrain-")}
    assert not left


def connect_where_one_does_not_want(group: dist.ProcessGroup) -> bool:
    os.environ[VARIABLE] = "01"[dist.get_rank(group)]
    return connect(group, torch.device("cpu")) is None


def test_one_unwilling_rank_leaves_all_with_the_process_group() -> None:
    assert all(run_ranks(2, connect_where_one_does_not_want))


def wait_for_the_dead(group: dist.ProcessGroup) -> float:
    os.environ[VARIABLE] = "1"
    shared = connect(group, torch.device("cpu"))
    assert shared is not None
    if dist.get_rank(group) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1 is gone: rank 0 waited"):
        shared.all_to_all(torch.ones(4, 2), [2, 2], [2, 2])
    assert time.monotonic() - started < 10
    raise ValueError("rank 0 saw it")


def test_a_dead_peer_is_noticed_at_once() -> None:
    if cpu_backend() != "native":
        pytest.skip("the native library was not built")
    with pytest.raises(Exception, match=r"rank 0 saw it|rank 1"):
        run_ranks(2, wait_for_the_dead)
