"""Tables in host memory give what tables on the device give, bit for bit, whatever the cache holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import embedtrain as et
from embedtrain.checkpoint import CheckpointReader, CheckpointSaver, SaveOptions, latest_checkpoint, load_shards
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.ops._backend.transfer import HostCopy
from embedtrain.testing.threads import run_threads

FEATURES = [et.FeatureSpec("word", pooling="mean"), et.FeatureSpec("item"), et.FeatureSpec("other", "item", "sum")]
OPTIMIZERS = {
    "RowwiseAdagrad": lambda tables: et.optim.RowwiseAdagrad(tables, lr=0.1, eps=1e-6),
    "Adam": lambda tables: et.optim.Adam(tables, lr=0.1),
}
CACHES = [0, 700, 10**9]
"""No hot rows, some, all of them."""


def make(placement: str, cache_bytes: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 3, **options):
    tables = [et.TableSpec("word", 60, 4, dtype=dtype), et.TableSpec("item", 20, 4, dtype=dtype)]
    return et.EmbeddingCollection(tables, FEATURES, seed=seed, placement=placement, cache_bytes=cache_bytes, **options)


def batch_of(step: int, rank: int = 0) -> dict[str, et.Jagged]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    lengths = torch.randint(0, 4, (6,), generator=generator)
    words = torch.randint(0, 60, (int(lengths.sum()),), generator=generator)
    return {"word": et.Jagged(words, lengths), "item": et.Jagged.from_ids(words % 20)}


def train(tables, optimizer, steps: range, rank: int = 0, brings_ahead: bool = False) -> None:
    for step in steps:
        sum(vectors.square().sum() for vectors in tables(batch_of(step, rank)).values()).backward()
        if brings_ahead:
            ids = batch_of(step + 1, rank)
            keys, _ = tables.table_groups[0].keys_of([0, 1], [ids["word"].values, ids["item"].values])
            tables.table_groups[0].access.bring_ahead(keys, HostCopy(keys), [keys])
        optimizer.step()
        optimizer.zero_grad()


def assert_equal(first, second) -> None:
    for ours, theirs in zip(first.shard_views(), second.shard_views(), strict=True):
        assert ours.name == theirs.name
        assert torch.equal(ours.tensor, theirs.tensor), ours.name


@pytest.mark.parametrize("brings_ahead", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("cache_bytes", CACHES)
def test_steps_are_the_devices(cache_bytes: int, optimizer: str, dtype: torch.dtype, brings_ahead: bool) -> None:
    on_device, on_host = make("device", dtype=dtype), make("host", cache_bytes, dtype)
    assert on_host.table_groups[0].access.is_on_host and not on_device.table_groups[0].access.is_on_host
    train(on_device, OPTIMIZERS[optimizer](on_device), range(8))
    train(on_host, OPTIMIZERS[optimizer](on_host), range(8), brings_ahead=brings_ahead)
    for name in ("word", "item"):
        assert torch.equal(on_device.gather_table(name), on_host.gather_table(name))
    assert_equal(on_device, on_host)


def test_hot_rows_stay_on_the_device_until_they_are_written_back() -> None:
    tables = make("host", 10**9)
    optimizer = OPTIMIZERS["RowwiseAdagrad"](tables)
    before = tables.table_groups[0].weight.clone()
    train(tables, optimizer, range(2))
    assert torch.equal(tables.table_groups[0].weight, before)
    tables.write_back()
    assert not torch.equal(tables.shards["word"].weight, before[:60])
    cold = make("host", 0)
    train(cold, OPTIMIZERS["RowwiseAdagrad"](cold), range(2))
    assert torch.equal(cold.table_groups[0].weight, tables.table_groups[0].weight)


def test_values_put_into_the_tables_are_read() -> None:
    tables = make("host", 700)
    train(tables, OPTIMIZERS["RowwiseAdagrad"](tables), range(2))
    tables.load_state_dict({key: torch.ones_like(value) for key, value in tables.state_dict().items()})
    with torch.no_grad():
        assert (tables({"item": et.Jagged.from_ids(torch.arange(20))})["item"] == 1).all()


@pytest.mark.parametrize("cache_bytes", CACHES)
def test_saves_in_the_background_hold_the_rows_as_they_were(cache_bytes: int, tmp_path: Path) -> None:
    tables, expected = make("host", cache_bytes), make("device")
    optimizers = [OPTIMIZERS["RowwiseAdagrad"](each) for each in (tables, expected)]
    saver = CheckpointSaver(str(tmp_path), ONE_PROCESS, ONE_PROCESS, SaveOptions(full_every=3))
    for save in range(5):
        steps = range(3 * save, 3 * save + 3)
        for each, optimizer in zip((tables, expected), optimizers, strict=True):
            train(each, optimizer, steps)
        saver.save(save + 1, tables.shard_views(), {})
        train(tables, optimizers[0], range(100, 102))  # while rows are written; undone below
        tables.shard_views()
        saver.settle()
        path = latest_checkpoint(str(tmp_path))
        assert path is not None
        loaded = make("host", cache_bytes, seed=9)
        OPTIMIZERS["RowwiseAdagrad"](loaded)
        with CheckpointReader(path) as reader:
            load_shards(reader, loaded.shard_views())
        assert_equal(loaded, expected)
        with CheckpointReader(path) as reader:
            for group in tables.table_groups:
                group.changes.before_update_of_all()
            load_shards(reader, tables.shard_views())


def train_on_ranks(ranks: Ranks, cache_bytes: int) -> None:
    on_device, on_host = (
        make(placement, bytes_of_cache, ranks=ranks)
        for placement, bytes_of_cache in (("device", None), ("host", cache_bytes))
    )
    for tables in (on_device, on_host):
        train(tables, OPTIMIZERS["RowwiseAdagrad"](tables), range(5), ranks.rank)
    assert_equal(on_device, on_host)


@pytest.mark.parametrize("cache_bytes", [0, 300])
def test_ranks_agree_with_tables_on_the_device(cache_bytes: int) -> None:
    run_threads(3, train_on_ranks, cache_bytes)


def test_auto_takes_the_device_where_that_is_the_host() -> None:
    assert not make("auto", 100).table_groups[0].access.is_on_host


@pytest.mark.parametrize(("placement", "cache_bytes"), [("gpu", None), ("host", -1), ("device", 5)])
def test_options_that_make_no_sense_are_refused(placement: str, cache_bytes: int | None) -> None:
    with pytest.raises(ValueError):
        make(placement, cache_bytes)
