"""Tables that are frozen, and tables whose gradients nobody takes."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.ops._backend import dispatch, library
from embedtrain.testing.threads import run_threads

IDS = torch.tensor([1, 2, 2, 7])
SAME_GROUP = [et.TableSpec("user", 20, 4), et.TableSpec("text", 30, 4)]
TWO_GROUPS = [et.TableSpec("user", 20, 4), et.TableSpec("text", 30, 4, optimizer="other")]


def make(
    specs: list[et.TableSpec] = SAME_GROUP, ranks: Ranks | None = None, pool_at: str = "auto"
) -> tuple[et.EmbeddingCollection, et.optim.SparseOptimizer]:
    features = [et.FeatureSpec(spec.name, pooling="sum", pool_at=pool_at) for spec in specs]
    tables = et.EmbeddingCollection(specs, features, ranks=ranks, seed=3)
    # Weight decay and moments would move rows whose gradient is zero.
    return tables, et.optim.Adam(tables, lr=0.1, weight_decay=0.1)


def step(tables: et.EmbeddingCollection, optimizer: et.optim.SparseOptimizer, ids: torch.Tensor = IDS) -> None:
    vectors = tables({"user": ids, "text": ids})
    (vectors["user"] * vectors["text"]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def rows(tables: et.EmbeddingCollection) -> dict[str, torch.Tensor]:
    return {name: tables.gather_table(name).clone() for name in tables.shards}


@pytest.mark.parametrize("specs", [SAME_GROUP, TWO_GROUPS], ids=["one_group", "two_groups"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("pool_at", ["example", "owner"])
def test_a_frozen_table_stays_and_the_others_train_as_if_it_were_a_constant(
    specs: list[et.TableSpec], world_size: int, pool_at: str
) -> None:
    def train(ranks: Ranks) -> tuple[dict, dict, dict, dict]:
        tables, optimizer = make(specs, ranks, pool_at)
        before = rows(tables)
        tables.requires_grad_(False, tables=["text"])
        step(tables, optimizer, IDS + ranks.rank)
        frozen = rows(tables)
        state = {name: tables.gather_table("text", name).clone() for name in ("exp_avg", "exp_avg_sq")}
        tables.requires_grad_(True, tables=["text"])
        step(tables, optimizer, IDS + ranks.rank)
        return before, frozen, state, rows(tables)

    def train_user_alone(ranks: Ranks) -> torch.Tensor:
        tables = et.EmbeddingCollection(SAME_GROUP, [et.FeatureSpec("user", pooling="sum")], ranks=ranks, seed=3)
        optimizer = et.optim.Adam(tables, lr=0.1, weight_decay=0.1)
        text = tables.gather_table("text")[IDS + ranks.rank]
        (tables({"user": IDS + ranks.rank})["user"] * text).sum().backward()
        optimizer.step()
        return tables.gather_table("user").clone()

    alone = run_threads(world_size, train_user_alone)[0]
    for before, frozen, state, after in run_threads(world_size, train):
        assert torch.equal(frozen["text"], before["text"])
        assert not any(tensor.any() for tensor in state.values())
        assert torch.equal(frozen["user"], alone)
        assert not torch.equal(after["text"], before["text"])


def test_a_frozen_collection_has_no_backward_and_trains_again_afterwards() -> None:
    tables, optimizer = make()
    before = rows(tables)
    assert tables.requires_grad_(False) is tables
    vectors = tables({"user": IDS, "text": IDS})
    assert not any(part.requires_grad for part in vectors.values())
    optimizer.step()
    assert all(torch.equal(rows(tables)[name], before[name]) for name in before)
    assert "frozen" in repr(tables)
    tables.requires_grad_()
    step(tables, optimizer)
    assert not any(torch.equal(rows(tables)[name], before[name]) for name in before)
    assert "frozen" not in repr(tables)


def test_weights_of_ids_are_learned_though_all_rows_are_frozen() -> None:
    tables, _ = make()
    tables.requires_grad_(False)
    weights = torch.ones(4, requires_grad=True)
    tables({"user": et.Jagged(IDS, torch.tensor([4]), weights)})["user"].sum().backward()
    torch.testing.assert_close(weights.grad, tables.gather_table("user")[IDS].sum(dim=1))
    assert tables.table_groups[0].gradients.rows_and_values()[0].numel() == 0


def test_an_unknown_table_is_not_frozen() -> None:
    with pytest.raises(ValueError, match="there is no table texts; the tables are user, text"):
        make()[0].requires_grad_(False, tables=["texts"])


def test_gradients_that_no_optimizer_takes_do_not_pile_up(caplog: pytest.LogCaptureFixture) -> None:
    tables = et.EmbeddingCollection([et.TableSpec("nobodys", 50, 4)])
    with caplog.at_level(logging.WARNING):
        for number in range(400):
            tables({"nobodys": torch.arange(20) + number % 30})["nobodys"].sum().backward()
            mailbox = tables.table_groups[0].gradients
            assert sum(delivery.rows.numel() for delivery in mailbox._deliveries) <= 17 * 20 + 49
    (record,) = caplog.records
    assert "the tables nobodys get gradients that no optimizer takes: make an optimizer of them, or" in record.message
    touched, sums = mailbox.rows_and_values()
    assert touched.numel() == 49
    assert sums.sum() == 400 * 20 * 4


def test_a_copy_that_the_old_optimizer_does_not_train_is_named_at_the_second_backward(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tables = et.EmbeddingCollection([et.TableSpec("copied alone", 5, 4)])
    optimizer = et.optim.SGD(tables, lr=0.1)
    copied = copy.deepcopy(tables)
    for trained in (tables, tables, copied):
        trained({"copied alone": torch.arange(3)})["copied alone"].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        trained.zero_grad()
    assert not caplog.records
    copied({"copied alone": torch.arange(3)})["copied alone"].sum().backward()
    (record,) = caplog.records
    assert "the tables copied alone get gradients that no optimizer takes" in record.message
    assert "copy.deepcopy((tables, optimizer))" in record.message


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_many_accumulated_gradients_have_the_sum_of_all_at_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native" and library.find() is None:
        pytest.skip(library.HOW_TO_BUILD)
    monkeypatch.setenv(dispatch.VARIABLE, backend)
    dispatch.cpu_backend.cache_clear()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 20, (100, 30), generator=generator)
    factors = torch.randn(100, 30, 4, generator=generator)
    in_parts, at_once = (et.EmbeddingCollection([et.TableSpec("x", 20, 4)]) for _ in range(2))
    for own, factor in zip(ids, factors, strict=True):
        (in_parts({"x": own})["x"] * factor).sum().backward()
    (at_once({"x": ids.flatten()})["x"] * factors.flatten(0, 1)).sum().backward()
    found, expected = (tables.table_groups[0].gradients.rows_and_values() for tables in (in_parts, at_once))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    dispatch.cpu_backend.cache_clear()


@pytest.mark.parametrize("world_size", [1, 2])
def test_forty_micro_batches_round_alike_whether_sums_are_made_in_between(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(ranks: Ranks) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(ranks.rank)
        tables = et.EmbeddingCollection([et.TableSpec("x", 20, 4)], ranks=ranks)
        optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
        for _ in range(40):
            ids, factors = torch.randint(0, 20, (30,), generator=generator), torch.randn(30, 4, generator=generator)
            (tables({"x": ids})["x"] * factors).sum().backward()
        num_deliveries = len(tables.table_groups[0].gradients._deliveries)
        optimizer.step()
        return tables.gather_table("x"), num_deliveries

    summed_up = run_threads(world_size, train)
    monkeypatch.setattr("embedtrain.embedding.gradients._MOST_DELIVERIES", 40)
    as_delivered = run_threads(world_size, train)
    for (found, fewer), (expected, all_of_them) in zip(summed_up, as_delivered, strict=True):
        assert fewer < all_of_them == 40
        assert torch.equal(found, expected)
