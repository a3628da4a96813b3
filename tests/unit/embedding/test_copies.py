"""Copies of tables and optimizers, by pickle and its kind or by deepcopy, train and save rows of their own."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import embedtrain as et
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint, load_shards, save_checkpoint
from embedtrain.distributed.ranks import ONE_PROCESS, GroupRanks, Ranks
from embedtrain.embedding.shard_view import table_steps
from embedtrain.testing.threads import run_threads

SPECS = [
    et.TableSpec("item", 10, 4),
    et.TableSpec("user", 7, 4),
    et.TableSpec("word", 5, 3, dtype=torch.bfloat16, optimizer="other"),
]
IDS = torch.tensor([1, 2, 2, 3])


def by_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_joblib(value: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KMP_INIT_AT_FORK", "FALSE")  # as joblib itself sets it when it is imported
        joblib = pytest.importorskip("joblib")
    file = io.BytesIO()
    joblib.dump(value, file)
    file.seek(0)
    return joblib.load(file)


WAYS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch": by_torch,
    "joblib": by_joblib,
}


def make(kind: str = "adam", ranks: Ranks | None = None) -> tuple[et.EmbeddingCollection, et.optim.SparseOptimizer]:
    tables = et.EmbeddingCollection(SPECS, ranks=ranks, seed=3)
    if kind != "combined":
        return tables, et.optim.OPTIMIZERS[kind](tables, lr=0.1)
    parts = et.optim.SGD(tables.trained_by("default"), lr=0.1), et.optim.Adam(tables.trained_by("other"), lr=0.1)
    return tables, et.optim.Combined(*parts)


def step(tables: et.EmbeddingCollection, optimizer: et.optim.SparseOptimizer) -> None:
    sum(part.square().sum() for part in tables({spec.name: IDS for spec in SPECS}).values()).backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(tables: et.EmbeddingCollection) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{kind}": tables.gather_table(name, kind).clone()
        for name, shard in tables.shards.items()
        for kind in ("weight", *shard.state)
    }


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("kind", [*et.optim.OPTIMIZERS, "combined"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copied_pair_goes_on_as_the_original_and_leaves_it_alone(way: str, kind: str, tmp_path: Path) -> None:
    tables, optimizer = make(kind)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    step(tables, optimizer)
    scheduler.step()
    before = whole(tables)
    copied, copied_optimizer = WAYS[way]((tables, optimizer))
    step(copied, copied_optimizer)
    assert equal(whole(tables), before)
    step(tables, optimizer)
    assert equal(whole(copied), whole(tables))
    assert [group["step"] for group in copied_optimizer.param_groups] == [2] * len(tables.table_groups)
    # What it saves and loads is what it trains.
    assert equal(state_of(copied), state_of(tables))
    save_checkpoint(str(tmp_path), 2, copied.shard_views(), {}, ONE_PROCESS)
    loaded, loaded_optimizer = make(kind)
    with CheckpointReader(latest_checkpoint(str(tmp_path))) as reader:
        load_shards(reader, loaded.shard_views())
    assert equal(whole(loaded), whole(copied))
    assert loaded_optimizer.param_groups[0]["step"] == 2
    copied.load_state_dict({name: torch.ones_like(entry) for name, entry in copied.state_dict().items()})
    assert (copied({"user": IDS})["user"] == 1).all()
    for group in copied.table_groups:
        for shard in group.shards:
            assert shard.weight.untyped_storage().data_ptr() == group.weight.untyped_storage().data_ptr()


def state_of(tables: et.EmbeddingCollection) -> dict[str, torch.Tensor]:
    return dict(tables.state_dict())


@pytest.mark.parametrize("way", WAYS)
def test_tables_that_are_copied_alone_take_an_optimizer_of_their_own(way: str) -> None:
    tables, optimizer = make()
    step(tables, optimizer)
    before = whole(tables)
    copied = WAYS[way](tables)
    assert equal(whole(copied), before)
    own = et.optim.RowwiseAdagrad(copied, lr=0.1)
    step(copied, own)
    assert equal(whole(tables), before)
    assert not torch.equal(copied.gather_table("item"), tables.gather_table("item"))
    assert set(copied.shards["item"].state) == {"accumulator"}


def test_a_copy_has_no_gradients_that_wait_and_stays_frozen() -> None:
    tables, _ = make()
    tables.requires_grad_(False, tables=["user"])
    tables({"item": IDS})["item"].sum().backward()
    copied = copy.deepcopy(tables)
    assert copied.table_groups[0].gradients.rows_and_values()[0].numel() == 0
    assert copied.table_groups[0].frozen == {"user"}


DOORS: dict[str, Callable[[et.EmbeddingCollection, et.optim.SparseOptimizer], int]] = {
    "pair": lambda tables, optimizer: copy.deepcopy((tables, optimizer))[1].param_groups[0]["step"],
    "optimizer": lambda tables, optimizer: optimizer.state_dict()["param_groups"][0]["step"],
    "tables": lambda tables, optimizer: int(tables.state_dict()["item.step"]),
    "views": lambda tables, optimizer: table_steps(tables.shard_views())["item"],
}


@pytest.mark.parametrize("kind", ["adam", "combined"])
@pytest.mark.parametrize("door", DOORS)
def test_a_step_left_out_that_nobody_looked_at_yet_is_not_counted(door: str, kind: str) -> None:
    tables, optimizer = make(kind)
    optimizer.nonfinite, optimizer.looks_later = "skip", True
    step(tables, optimizer)
    (tables({"item": IDS})["item"] * float("nan")).sum().backward()
    optimizer.step()
    assert DOORS[door](tables, optimizer) == 1
    assert optimizer.num_skipped == 1


def test_a_step_left_out_does_not_count_down_what_is_loaded() -> None:
    for load in (
        lambda tables, optimizer, saved: optimizer.load_state_dict(saved[1]),
        lambda tables, optimizer, saved: tables.load_state_dict(saved[0]),
    ):
        tables, optimizer = make()
        optimizer.nonfinite, optimizer.looks_later = "skip", True
        step(tables, optimizer)
        saved = tables.state_dict(), optimizer.state_dict()
        (tables({"item": IDS})["item"] * float("nan")).sum().backward()
        optimizer.step()
        load(tables, optimizer, saved)
        optimizer.settle()
        assert optimizer.param_groups[0]["step"] == 1


def copy_on(ranks: Ranks) -> tuple[bool, bool]:
    tables, optimizer = make(ranks=ranks)
    step(tables, optimizer)
    before = whole(tables)
    copied, copied_optimizer = copy.deepcopy((tables, optimizer))
    step(copied, copied_optimizer)
    is_apart = equal(whole(tables), before)
    step(tables, optimizer)
    return is_apart, equal(whole(copied), whole(tables))


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_copy_belongs_to_the_same_ranks(world_size: int) -> None:
    assert run_threads(world_size, copy_on) == [(True, True)] * world_size


def test_a_pickle_of_one_rank_of_several_is_refused_elsewhere() -> None:
    ranks = object.__new__(GroupRanks)
    ranks.rank, ranks.size = 1, 2
    with pytest.raises(
        RuntimeError, match=r"pickled by rank 1 of 2, and this is rank 0 of 1.*a checkpoint, which loads on any"
    ):
        pickle.loads(pickle.dumps(ranks))
