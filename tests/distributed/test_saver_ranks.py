"""Saves in the background on real ranks, with the optimizer that they must not wait for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import embedtrain as et
from embedtrain import storage
from embedtrain.checkpoint import (
    CheckpointReader,
    CheckpointSaver,
    SaveOptions,
    find_checkpoints,
    load_shards,
)
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import CheckpointError
from embedtrain.testing.ranks import run_ranks

TABLES = [et.TableSpec("item", 1001, 8), et.TableSpec("user", 3, 8), et.TableSpec("word", 200, 4, dtype=torch.bfloat16)]


def _train(tables: et.EmbeddingCollection, optimizer: et.optim.SparseOptimizer, step: int, ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(100 * step + ranks.rank)
    batch = {
        spec.name: et.Jagged.from_ids(torch.randint(0, spec.num_rows, (40,), generator=generator)) for spec in TABLES
    }
    sum(vectors.sum() for vectors in tables(batch).values()).backward()
    optimizer.step()
    optimizer.zero_grad()


def _whole(tables: et.EmbeddingCollection) -> list[torch.Tensor]:
    names = [(table, name) for table, shard in tables.shards.items() for name in ("weight", *shard.state)]
    return [tables.gather_table(table, name).clone() for table, name in names]


def _save_while_training(ranks: Ranks, root: str, optimizer_name: str) -> list[list[torch.Tensor]]:
    tables = et.EmbeddingCollection(TABLES, ranks=ranks)
    optimizer = et.optim.OPTIMIZERS[optimizer_name](tables, lr=0.1)
    saver = CheckpointSaver(root, ranks, ranks.for_thread(60.0), SaveOptions(full_every=4))
    expected = []
    for step in range(1, 25):
        _train(tables, optimizer, step, ranks)
        if step % 4 == 0:
            expected.append(_whole(tables))
            saver.save(step, tables.shard_views(), {}, is_last=step == 24)
    return expected


def _load(ranks: Ranks, path: str, optimizer_name: str) -> list[torch.Tensor]:
    tables = et.EmbeddingCollection(TABLES, ranks=ranks)
    et.optim.OPTIMIZERS[optimizer_name](tables)
    with CheckpointReader(path) as reader:
        load_shards(reader, tables.shard_views())
    return _whole(tables)


@pytest.mark.parametrize(
    ("saved_on", "loaded_on", "optimizer_name"),
    [(1, 2, "adam"), (2, 3, "rowwise_adagrad"), (3, 1, "rowwise_adam"), (4, 2, "rowwise_adagrad")],
)
def test_chains_saved_on_m_ranks_load_on_n(saved_on: int, loaded_on: int, optimizer_name: str, tmp_path: Path) -> None:
    expected = run_ranks(saved_on, _save_while_training, str(tmp_path), optimizer_name)[0]
    found = find_checkpoints(str(tmp_path))
    assert [checkpoint.step for checkpoint in found] == [4, 8, 12, 16, 20, 24]
    for number in (0, 3, 5):
        loaded = run_ranks(loaded_on, _load, found[number].path, optimizer_name)[0]
        for tensor, other in zip(loaded, expected[number], strict=True):
            assert torch.equal(tensor, other)


def _fail_on_one_rank(ranks: Ranks, root: str) -> tuple[int, str]:
    if ranks.rank == 1:

        def full(url: str, chunks: object) -> None:
            raise OSError(28, "No space left on device")

        storage.write = full
    tables = et.EmbeddingCollection(TABLES, ranks=ranks)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    saver = CheckpointSaver(root, ranks, ranks.for_thread(60.0), SaveOptions(max_failures=1))
    for step in range(1, 10):
        _train(tables, optimizer, step, ranks)
        try:
            saver.save(step, tables.shard_views(), {})
        except CheckpointError as error:
            return step, str(error)
    return 0, ""


def test_a_failure_in_the_background_of_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    first, second = run_ranks(2, _fail_on_one_rank, str(tmp_path))
    assert first == second
    assert first[0] == 3
    assert "rank 1: OSError: [Errno 28] No space left on device (consecutive failed saves: 2)" in first[1]
    assert find_checkpoints(str(tmp_path)) == []
