"""Every rank looks up the same features in a step; if not, each rank says which rank looks up what, and none waits."""

from __future__ import annotations

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.testing.ranks import run_ranks
from embedtrain.testing.threads import run_threads

IDS = torch.tensor([1, 2])


def look_up(ranks: Ranks, dims: tuple[int, int], names: list[list[str]], is_ahead: bool) -> tuple[str, bool]:
    tables = et.EmbeddingCollection([et.TableSpec("x", 20, dims[0]), et.TableSpec("y", 20, dims[1])], ranks=ranks)
    batch = {name: IDS for name in names[ranks.rank]}
    tables({"x": IDS, "y": IDS})
    try:
        tables.look_up(tables.ask(batch, is_ahead=is_ahead))
    except ValueError as error:
        # The ranks are still in step: the next look-up works.
        vectors = tables({"y": IDS, "x": IDS})
        return str(error), torch.equal(vectors["x"], tables.gather_table("x")[IDS])
    return "", True


@pytest.mark.parametrize("dims", [(4, 4), (4, 8)], ids=["one_group", "two_groups"])
@pytest.mark.parametrize("is_ahead", [False, True])
@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([["x", "y"], ["x"]], "rank 0: x, y; rank 1: x"),
        ([["y"], ["x"]], "rank 0: y; rank 1: x"),
        ([["x"], ["x", "y"], ["x"]], "ranks 0, 2: x; rank 1: x, y"),
    ],
)
def test_each_rank_names_the_features_of_each(
    names: list[list[str]], found: str, dims: tuple[int, int], is_ahead: bool
) -> None:
    for message, goes_on in run_threads(len(names), look_up, dims, names, is_ahead):
        assert f"the ranks look up different features ({found})" in message
        assert "if a rank has no ids of a feature, give it an empty tensor" in message
        assert goes_on


def test_processes_do_so_too() -> None:
    for message, goes_on in run_ranks(2, look_up, (4, 8), [["x", "y"], ["y"]], False):
        assert "(rank 0: x, y; rank 1: y)" in message
        assert goes_on


def train_in_orders(ranks: Ranks, orders: list[list[str]]) -> dict[str, torch.Tensor]:
    tables = et.EmbeddingCollection([et.TableSpec("x", 20, 4), et.TableSpec("y", 20, 8)], ranks=ranks)
    optimizer = et.optim.Adagrad(tables, lr=0.1)
    for _ in range(2):
        vectors = tables({name: IDS + ranks.rank for name in orders[ranks.rank]})
        assert list(vectors) == orders[ranks.rank]
        (vectors["x"].sum() + vectors["y"].sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: tables.gather_table(name).clone() for name in "xy"}


def test_the_order_of_the_features_may_differ() -> None:
    expected = run_threads(2, train_in_orders, [["x", "y"], ["x", "y"]])[0]
    for found in run_threads(2, train_in_orders, [["x", "y"], ["y", "x"]]):
        assert all(torch.equal(found[name], expected[name]) for name in expected)
