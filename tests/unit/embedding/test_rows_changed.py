"""The gradient of weights needs the rows as they were: rows that changed since are an error, not a wrong gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.testing.threads import run_threads

Change = Callable[[et.EmbeddingCollection, "et.optim.RowwiseAdagrad"], object]


def learn(ranks: Ranks, change: Change | None) -> torch.Tensor:
    tables = et.EmbeddingCollection(
        [et.TableSpec("x", 20, 4)], [et.FeatureSpec("x", pooling="sum")], ranks=ranks, seed=1
    )
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    ids, lengths = torch.arange(6), torch.tensor([2, 4])
    tables({"x": et.Jagged(ids, lengths)})["x"].sum().backward()
    weights = torch.ones(6, requires_grad=True)
    pooled = tables({"x": et.Jagged(ids, lengths, weights)})["x"]
    if change is not None:
        change(tables, optimizer)
    pooled.sum().backward()
    assert weights.grad is not None
    return weights.grad


@pytest.mark.parametrize(
    "change", [lambda tables, optimizer: optimizer.step(), lambda tables, optimizer: tables.shards["x"].weight.add_(1)]
)
def test_rows_that_changed_between_forward_and_backward_are_an_error(change: Change) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run_threads(1, learn, change)


def test_several_ranks_have_copies_of_the_rows() -> None:
    expected = run_threads(2, learn, None)
    assert all(
        torch.equal(grad, same)
        for grad, same in zip(run_threads(2, learn, lambda tables, optimizer: optimizer.step()), expected, strict=True)
    )
