"""Models that compare with all rows of a table: each rank with its own, sharded as unsharded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import embedtrain as et
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.embedding.unsharded import UnshardedEmbeddingCollection
from embedtrain.testing.threads import run_threads

TABLES = [et.TableSpec("a", 11, 4), et.TableSpec("b", 2, 4), et.TableSpec("c", 7, 4, dtype=torch.bfloat16)]
LOOKED_UP = torch.tensor([3, 0, 3, 10])


def train(
    tables: et.EmbeddingCollection | UnshardedEmbeddingCollection, frozen: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Each rank compares with its own rows and adds what it looked up; the loss is the sum over the ranks."""
    size = tables.ranks.size if isinstance(tables, et.EmbeddingCollection) else 1
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    if isinstance(tables, et.EmbeddingCollection) and frozen:
        tables.requires_grad_(False, tables=list(frozen))
    mine = LOOKED_UP[tables.ranks.rank :: size] if isinstance(tables, et.EmbeddingCollection) else LOOKED_UP
    for _ in range(3):
        looked_up = tables({"a": et.Jagged.from_ids(mine)})["a"]
        loss = looked_up.pow(3).sum()
        for name in ("a", "b", "c"):
            loss = loss + (tables.own_rows(name) - 0.3).square().sum()
        (loss * size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {
        f"{name}/{kind}": tables.gather_table(name, kind)
        for name in ("a", "b", "c")
        for kind in ("weight", "accumulator")
    }


def sharded(ranks: Ranks, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    return train(et.EmbeddingCollection(TABLES, ranks=ranks, seed=5), frozen)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_own_rows_train_sharded_as_unsharded(world_size: int) -> None:
    expected = train(UnshardedEmbeddingCollection(TABLES, seed=5))
    for found in run_threads(world_size, sharded):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name].float(), tensor.float(), rtol=2e-5, atol=1e-6, msg=name)


def test_own_rows_come_in_order_of_slots() -> None:
    tables = et.EmbeddingCollection(TABLES, seed=5)
    for name, shard in tables.shards.items():
        ids = shard.layout.id_of(torch.arange(*shard.slots))
        assert torch.equal(tables.own_rows(name).detach(), tables.gather_table(name)[ids].float())


def test_frozen_rows_get_no_gradient() -> None:
    before = et.EmbeddingCollection(TABLES, seed=5)
    after = sharded(ONE_PROCESS, ("a", "c"))
    assert torch.equal(after["a/weight"], before.gather_table("a"))
    assert torch.equal(after["c/weight"], before.gather_table("c"))
    assert not torch.equal(after["b/weight"], before.gather_table("b"))
