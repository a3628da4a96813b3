"""Training on a GPU against training on the CPU, checkpoints between the two, NCCL, and Gloo with CUDA tensors."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import embedtrain as et
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint, load_shards, save_checkpoint
from embedtrain.data.skipgram import TextBatch
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.ops.sample_text import TextSample
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.ranking.model import Ranking
from embedtrain.recipes.word2vec.model import Word2Vec
from embedtrain.testing.ranks import run_ranks
from embedtrain.train.ahead import BatchesAhead
from embedtrain.train.step import StepOptions, micro_batches, train_step
from embedtrain.train.task import Task
from tests.distributed.test_ranking_ranks import FEATURES as CLICK_FEATURES
from tests.distributed.test_ranking_ranks import NUM_DENSE, global_batch
from tests.distributed.test_ranking_ranks import OPTIONS as NETWORKS
from tests.distributed.test_ranking_ranks import TABLES as CLICK_TABLES

pytestmark = pytest.mark.gpu

TABLES = [et.TableSpec("word", 200, 16), et.TableSpec("item", 50, 16)]
FEATURES = [et.FeatureSpec("word", pooling="mean"), et.FeatureSpec("item"), et.FeatureSpec("other", "item", "sum")]


def batches(device: torch.device | str, rank: int = 0) -> list[dict[str, et.Jagged]]:
    generator = torch.Generator().manual_seed(rank)
    drawn = []
    for _ in range(3):
        lengths = torch.randint(0, 6, (40,), generator=generator)
        values = torch.randint(0, 50, (int(lengths.sum()),), generator=generator)
        bags = et.Jagged(values.to(device), lengths.to(device))
        drawn.append({"word": bags, "item": et.Jagged.from_ids(values.to(device)), "other": bags})
    return drawn


def train(tables: et.EmbeddingCollection, rank: int = 0) -> None:
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1, eps=1e-6)
    for batch in batches(tables.device, rank):
        vectors = tables(batch)
        sum(vector.square().sum() for vector in vectors.values()).backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same_rows(first: et.EmbeddingCollection, second: et.EmbeddingCollection) -> None:
    for ours, theirs in zip(first.shard_views(), second.shard_views(), strict=True):
        assert ours.name == theirs.name
        torch.testing.assert_close(ours.tensor.cpu(), theirs.tensor.cpu(), rtol=1e-4, atol=1e-5)


def test_steps_equal_the_cpus(device: torch.device) -> None:
    on_gpu, on_cpu = (et.EmbeddingCollection(TABLES, FEATURES, device=place, seed=3) for place in (device, "cpu"))
    for tables in (on_gpu, on_cpu):
        train(tables)
    assert_same_rows(on_gpu, on_cpu)


@pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
def test_a_step_of_word_vectors_equals_the_cpus(device: torch.device, architecture: str) -> None:
    positions = torch.arange(60)
    sample = TextSample(
        positions % 23,
        torch.stack([positions % 23, (positions * 7) % 23, (positions * 5) % 23], dim=1),
        (positions - 3).clamp(min=0),
        (positions + 3).clamp(max=60),
    )
    models = []
    for place in (device, "cpu"):
        model = Word2Vec(23, 16, architecture=architecture, device=place, seed=2)
        optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1, initial_accumulator_value=1.0)
        for _ in range(2):
            model(TextBatch(sample, 60)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert_same_rows(models[0].tables, models[1].tables)


class Text:
    """Batches in host memory, as `train` draws them."""

    steps_per_epoch = 4
    examples_per_epoch = 240

    def batch(self, epoch: int, step: int) -> TextBatch:
        positions = torch.arange(60)
        words = (positions * (step + 3)) % 23
        targets = torch.stack([words, (positions * 7) % 23, (positions * 5) % 23], dim=1)
        return TextBatch(TextSample(words, targets, (positions - 3).clamp(min=0), (positions + 3).clamp(max=60)), 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", ["device", "host"])
def test_steps_prepared_ahead_equal_the_cpus(device: torch.device, placement: str, dtype: torch.dtype) -> None:
    trained = []
    for place in (device, torch.device("cpu")):
        model = Word2Vec(23, 16, device=place, seed=2, placement=placement, dtype=dtype)
        optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1, initial_accumulator_value=1.0)
        optimizer.looks_later = place.type == "cuda"
        ahead = BatchesAhead(Task(model, model.tables, optimizer, Text()))
        for step in range(4):
            batch = ahead.take(0, step).batch
            train_step(
                model, optimizer, batch, meanwhile=lambda step=step, ahead=ahead: ahead.prepare_next(0, step + 1)
            )
        optimizer.settle()
        trained.append(model.tables)
    for ours, theirs in zip(*(tables.shard_views() for tables in trained), strict=True):
        bound = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.002}
        torch.testing.assert_close(ours.tensor.cpu(), theirs.tensor, **bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_waits_for_nothing_in_a_step(device: torch.device, dtype: torch.dtype) -> None:
    model = Word2Vec(23, 16, device=device, seed=2, dtype=dtype)
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1, initial_accumulator_value=1.0)
    optimizer.looks_later = True
    text = Text()
    for step in range(4):
        if step == 2:  # all is compiled
            torch.cuda.set_sync_debug_mode("error")
        try:
            train_step(model, optimizer, model.prepare(text.batch(0, step)))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    optimizer.settle()
    assert optimizer.num_skipped == 0


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (StepOptions(), 1e-4),
        (StepOptions(tf32=True), 5e-3),
        (StepOptions(precision=torch.bfloat16, device_type="cuda"), 3e-2),
    ],
)
@pytest.mark.parametrize("accumulate_steps", [1, 3])
def test_dense_layers_in_each_precision_and_in_micro_batches(
    device: torch.device, options: StepOptions, tolerance: float, accumulate_steps: int
) -> None:
    losses = []
    for place in (device, torch.device("cpu")):
        model = Ranking(CLICK_TABLES, CLICK_FEATURES, NUM_DENSE, NETWORKS["dlrm"], device=place, seed=5)
        optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1, initial_accumulator_value=0.1)
        dense = DenseOptimizer(model.network, ranks=ONE_PROCESS, lr=0.01)
        own = options if place.type == "cuda" else StepOptions()
        for step in range(3):
            first, *further = micro_batches(global_batch(step), accumulate_steps)
            objective = train_step(model, optimizer, first, dense, further=further, options=own)
        losses.append(float(objective.total))
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


def test_a_step_that_is_not_finite_is_left_out(device: torch.device) -> None:
    tables = et.EmbeddingCollection(TABLES, device=device, seed=3)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1, nonfinite="skip")
    optimizer.looks_later = True
    before = tables.gather_table("item").clone()
    for factor in (math.nan, 1.0):
        (tables({"item": et.Jagged.from_ids(torch.arange(9, device=device))})["item"] * factor).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(tables.gather_table("item"), before) == (factor != factor)
    optimizer.settle()
    assert (optimizer.num_skipped, optimizer.param_groups[0]["step"]) == (1, 1)


@pytest.mark.parametrize("saved_on_gpu", [True, False])
def test_checkpoints_move_between_devices(device: torch.device, saved_on_gpu: bool, tmp_path: Path) -> None:
    places = [device, torch.device("cpu")] if saved_on_gpu else [torch.device("cpu"), device]
    saved, loaded = (et.EmbeddingCollection(TABLES, FEATURES, device=place, seed=s) for s, place in enumerate(places))
    train(saved)
    et.optim.RowwiseAdagrad(loaded, lr=0.1)
    save_checkpoint(str(tmp_path), 3, saved.shard_views(), {}, ONE_PROCESS)
    path = latest_checkpoint(str(tmp_path))
    assert path is not None
    with CheckpointReader(path) as reader:
        load_shards(reader, loaded.shard_views())
    for ours, theirs in zip(saved.shard_views(), loaded.shard_views(), strict=True):
        assert torch.equal(ours.tensor.cpu(), theirs.tensor.cpu())


def test_nccl_on_one_rank(device: torch.device, tmp_path: Path) -> None:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        tables = et.EmbeddingCollection(TABLES, FEATURES, device=device, seed=3)
        train(tables)
        counts = torch.tensor([3], device=device)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, [1], [1])
        assert int(received) == 3
    finally:
        dist.destroy_process_group()
    alone = et.EmbeddingCollection(TABLES, FEATURES, device="cpu", seed=3)
    train(alone)
    for name in ("word", "item"):
        torch.testing.assert_close(tables.shards[name].weight.cpu(), alone.shards[name].weight, rtol=1e-4, atol=1e-5)


def share_one_device(ranks: Ranks, device: torch.device) -> None:
    on_gpu, on_cpu = (
        et.EmbeddingCollection(TABLES, FEATURES, device=place, ranks=ranks, seed=3) for place in (device, "cpu")
    )
    for tables in (on_gpu, on_cpu):
        train(tables, ranks.rank)
    assert_same_rows(on_gpu, on_cpu)


def test_two_ranks_on_one_gpu_with_gloo(device: torch.device) -> None:
    run_ranks(2, share_one_device, device)
