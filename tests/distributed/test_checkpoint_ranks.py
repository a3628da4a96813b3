"""Saving and loading on real ranks: the matrix of world sizes, failures, and memory."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from embedtrain import storage
from embedtrain.checkpoint import (
    CheckpointReader,
    ShardView,
    agree_on_latest,
    find_checkpoints,
    load_shards,
    save_checkpoint,
    verify,
)
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import CheckpointError
from embedtrain.testing.ranks import RankError, run_ranks
from tests.unit.checkpoint.example import example_tables, views_of


def _save(ranks: Ranks, root: str, step: int) -> str:
    return save_checkpoint(root, step, views_of(example_tables(), ranks.rank, ranks.size), {"step": step}, ranks)


def _load(ranks: Ranks, root: str) -> list[torch.Tensor]:
    path = agree_on_latest(root, ranks)
    assert path is not None
    views = [
        ShardView(view.name, view.global_shape, view.offset, torch.zeros_like(view.tensor), view.layout)
        for view in views_of(example_tables(), ranks.rank, ranks.size)
    ]
    with CheckpointReader(path) as reader:
        load_shards(reader, views)
    return [view.tensor for view in views]


@pytest.mark.parametrize("saved_on", [1, 2, 3, 4])
def test_saved_on_m_ranks_loads_on_another_number(saved_on: int, tmp_path: Path) -> None:
    paths = run_ranks(saved_on, _save, str(tmp_path), 5)
    assert set(paths) == {str(tmp_path / "step-000000005")}
    loaded = run_ranks(5 - saved_on, _load, str(tmp_path))
    for index, table in enumerate(example_tables().values()):
        assert torch.equal(torch.cat([tensors[index] for tensors in loaded]), table)


def _save_with_a_full_disk(ranks: Ranks, root: str) -> str:
    if ranks.rank == 1:

        def full(url: str, chunks: Any) -> None:
            raise OSError(28, "No space left on device")

        storage.write = full
    try:
        _save(ranks, root, 2)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_full_disk_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    run_ranks(2, _save, str(tmp_path), 1)
    first, second = run_ranks(2, _save_with_a_full_disk, str(tmp_path))
    assert first == second
    assert "rank 1: OSError: [Errno 28] No space left on device" in first
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]


def _die_while_saving(ranks: Ranks, root: str, dying_rank: int, function: str) -> None:
    if ranks.rank == dying_rank:

        def die(*args: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(storage, function, die)
    _save(ranks, root, 2)


@pytest.mark.parametrize(("dying_rank", "function"), [(0, "write"), (1, "write"), (0, "create")])
def test_a_rank_killed_while_saving_leaves_the_previous_checkpoint(
    dying_rank: int, function: str, tmp_path: Path
) -> None:
    (path, _) = run_ranks(2, _save, str(tmp_path), 1)
    with pytest.raises(RankError) as caught:
        run_ranks(2, _die_while_saving, str(tmp_path), dying_rank, function)
    assert caught.value.died == {dying_rank: "SIGKILL"}
    assert [found.path for found in find_checkpoints(str(tmp_path))] == [path]
    verify(path)
    run_ranks(2, _save, str(tmp_path), 2)
    assert [found.step for found in find_checkpoints(str(tmp_path))] == [1, 2]


_TABLE_BYTES = 96 * 2**20


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _measure(ranks: Ranks, root: str) -> tuple[int, int]:
    """Returns how much the peak of memory grew by saving and by loading a table of `_TABLE_BYTES`."""
    table = torch.ones(_TABLE_BYTES // 512, 128)
    shard = ShardView("t/weight", tuple(table.shape), 0, table)
    before = _peak_bytes()
    path = save_checkpoint(root, 1, [shard], {}, ranks)
    saved = _peak_bytes()
    table.zero_()
    with CheckpointReader(path) as reader:
        load_shards(reader, [shard])
    assert bool(table.all())
    return saved - before, _peak_bytes() - saved


def test_memory_beside_the_table_is_bounded(tmp_path: Path) -> None:
    ((saving, loading),) = run_ranks(1, _measure, str(tmp_path))
    assert saving < 32 * 2**20
    assert loading < 32 * 2**20
