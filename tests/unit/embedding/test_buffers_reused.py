"""A batch belongs to its caller: its tensors may be filled again once a look-up has returned."""

from __future__ import annotations

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.testing.threads import run_threads


def train(ranks: Ranks, optimizer: str, pooling: str, pool_at: str, is_weighted: bool, refilled: str) -> torch.Tensor:
    """Trains on two micro-batches; refills their one set of buffers after each forward or backward, or never."""
    feature = et.FeatureSpec("x", pooling=pooling, pool_at=pool_at)
    tables = et.EmbeddingCollection([et.TableSpec("x", 20, 4)], [feature], ranks=ranks, seed=0)
    trained_by = getattr(et.optim, optimizer)(tables, lr=1.0)
    generator = torch.Generator().manual_seed(ranks.rank)
    ids, lengths, weights = torch.zeros(6, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.zeros(6)
    for first in (2, 5):
        if refilled == "never":
            ids, lengths, weights = ids.clone(), lengths.clone(), weights.clone()
        ids.copy_(torch.randint(0, 20, (6,), generator=generator))
        lengths.copy_(torch.tensor([first, 6 - first]))
        weights.copy_(torch.rand(6, generator=generator))
        vectors = tables({"x": et.Jagged(ids, lengths, weights if is_weighted else None)})["x"]
        for moment in ("forward", "backward"):
            if moment == "backward":
                (vectors * torch.arange(1.0, 1 + len(vectors)).view(-1, 1)).sum().backward()
            if refilled == moment:
                # Through numpy, which torch's version counters do not see, and to what no kernel could bear.
                ids.numpy()[:], lengths.numpy()[:], weights.numpy()[:] = -1, 1 << 40, float("nan")
    trained_by.step()
    return tables.gather_table("x")


@pytest.mark.parametrize("refilled", ["forward", "backward"])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(
    ("pooling", "pool_at"), [("none", "auto"), ("sum", "example"), ("mean", "example"), ("mean", "owner")]
)
@pytest.mark.parametrize("optimizer", ["SGD", "RowwiseAdagrad", "Adam"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_refilled_buffers_change_nothing(
    world_size: int, optimizer: str, pooling: str, pool_at: str, is_weighted: bool, refilled: str
) -> None:
    options = (optimizer, pooling, pool_at, is_weighted)
    found = run_threads(world_size, train, *options, refilled)
    for rows, expected in zip(found, run_threads(world_size, train, *options, "never"), strict=True):
        assert torch.equal(rows, expected)
