"""Batches that were prepared a step ahead train to the same bits as batches that were not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import embedtrain as et
from embedtrain.data.click_batches import ClickBatch
from embedtrain.data.skipgram import TextBatch
from embedtrain.distributed.ranks import Ranks
from embedtrain.ops.sample_text import TextSample
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.ranking.model import NetworkOptions, Ranking
from embedtrain.recipes.word2vec.model import Word2Vec
from embedtrain.testing.ranks import run_ranks
from embedtrain.train.ahead import BatchesAhead, PreparesBatches
from embedtrain.train.checkpoints import Checkpoints, SavePolicy
from embedtrain.train.state import TrainState
from embedtrain.train.task import Task
from embedtrain.train.trainer import Trainer

NUM_WORDS = 40
FACTS = {"data_fingerprint": "x"}
POLICY = SavePolicy(3, None)


class Batches:
    steps_per_epoch = 4
    examples_per_epoch = 120

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.made: list[tuple[int, int]] = []

    def batch(self, epoch: int, step: int) -> TextBatch:
        self.made.append((epoch, step))
        generator = torch.Generator().manual_seed(100 * epoch + 10 * step + self._rank)
        words = torch.randint(0, NUM_WORDS, (30,), generator=generator)
        targets = torch.cat([words.view(30, 1), torch.randint(0, NUM_WORDS, (30, 3), generator=generator)], dim=1)
        positions = torch.arange(30)
        sample = TextSample(words, targets, (positions - 2).clamp(min=0), (positions + 3).clamp(max=30))
        return TextBatch(sample, 30)


def train(folder: str, ranks: Ranks, placement: str, cache_bytes: int | None) -> Task:
    model = Word2Vec(NUM_WORDS, 8, ranks=ranks, seed=1, placement=placement, cache_bytes=cache_bytes)
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.3, initial_accumulator_value=0.1)
    task = Task(model, model.tables, optimizer, Batches(ranks.rank))
    state = TrainState()
    checkpoints = Checkpoints(f"{folder}/{placement}", task, state, facts=FACTS, policy=POLICY, ranks=ranks)
    trainer = Trainer(task, state, epochs=2, schedule=lambda done: 1.0, checkpoints=checkpoints, ranks=ranks)
    assert trainer.run([], log_every_steps=5)
    return task


def both_ways(ranks: Ranks, folder: str, cache_bytes: int) -> None:
    ahead, plain = train(folder, ranks, "host", cache_bytes), train(folder, ranks, "device", None)
    assert ahead.batches.made == plain.batches.made == [(epoch, step) for epoch in range(2) for step in range(4)]
    for ours, theirs in zip(ahead.tables.shard_views(), plain.tables.shard_views(), strict=True):
        assert torch.equal(ours.tensor, theirs.tensor), ours.name


@pytest.mark.parametrize("cache_bytes", [0, 500])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_ends_with_the_same_rows(world_size: int, cache_bytes: int, tmp_path: Path) -> None:
    run_ranks(world_size, both_ways, str(tmp_path), cache_bytes)


class Clicks:
    """Batches of a feature of one id, of bags that their owners pool, and of bags that the ranks choose for."""

    steps_per_epoch = 4
    examples_per_epoch = 80

    def __init__(self, ranks: Ranks) -> None:
        self._rank, self._num_global = ranks.rank, 20 * ranks.size

    def batch(self, epoch: int, step: int) -> ClickBatch:
        generator = torch.Generator().manual_seed(100 * epoch + 10 * step + self._rank)
        lengths = torch.randint(0, 4, (20,), generator=generator)
        tags = torch.randint(0, NUM_WORDS, (int(lengths.sum()),), generator=generator)
        features = {
            "site": et.Jagged.from_ids(torch.randint(0, NUM_WORDS, (20,), generator=generator)),
            "tags": et.Jagged(tags, lengths),
            "seen": et.Jagged(tags.flip(0), lengths),
        }
        labels = torch.randint(0, 2, (20,), generator=generator).float()
        return ClickBatch(labels, torch.randn(20, 2, generator=generator), features, self._num_global)


def rank(folder: str, ranks: Ranks, placement: str, cache_bytes: int | None) -> Task:
    tables = [et.TableSpec("site", NUM_WORDS, 8), et.TableSpec("tag", NUM_WORDS, 8)]
    features = [
        et.FeatureSpec("site", pooling="sum"),
        et.FeatureSpec("tags", table="tag", pooling="mean", pool_at="owner"),
        et.FeatureSpec("seen", table="tag", pooling="sum"),
    ]
    options = {"ranks": ranks, "seed": 1, "placement": placement, "cache_bytes": cache_bytes}
    model = Ranking(tables, features, 2, NetworkOptions(top=(8,)), **options)
    dense = DenseOptimizer(model.network, ranks=ranks, lr=0.05)
    task = Task(model, model.tables, et.optim.RowwiseAdagrad(model.tables, lr=0.3), Clicks(ranks), dense=dense)
    state = TrainState()
    checkpoints = Checkpoints(f"{folder}/{placement}", task, state, facts=FACTS, policy=POLICY, ranks=ranks)
    trainer = Trainer(task, state, epochs=2, schedule=lambda done: 1.0, checkpoints=checkpoints, ranks=ranks)
    assert trainer.run([], log_every_steps=5)
    return task


def rank_both_ways(ranks: Ranks, folder: str) -> None:
    ahead, plain = rank(folder, ranks, "host", 500), rank(folder, ranks, "device", None)
    assert isinstance(ahead.model, PreparesBatches)
    for ours, theirs in zip(ahead.tables.shard_views(), plain.tables.shard_views(), strict=True):
        assert torch.equal(ours.tensor, theirs.tensor), ours.name
    assert ahead.dense is not None and plain.dense is not None
    for name, tensor in plain.dense.tensors().items():
        assert torch.equal(tensor, ahead.dense.tensors()[name]), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_features_that_are_pooled_are_prepared_too(world_size: int, tmp_path: Path) -> None:
    run_ranks(world_size, rank_both_ways, str(tmp_path))


def test_a_step_is_prepared_while_the_one_before_runs() -> None:
    model = Word2Vec(NUM_WORDS, 8, placement="host", cache_bytes=0)
    batches = Batches(0)
    ahead = BatchesAhead(Task(model, model.tables, et.optim.RowwiseAdagrad(model.tables), batches))
    ahead.take(0, 0)
    ahead.prepare_next(0, 1)
    assert batches.made == [(0, 0), (0, 1)]
    ahead.take(0, 1)
    assert batches.made == [(0, 0), (0, 1)]
    ahead.prepare_next(0, 2)
    ahead.take(1, 0)  # another than was expected, as after a resumed run
    assert batches.made[-2:] == [(0, 2), (1, 0)]
