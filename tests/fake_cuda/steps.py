"""A few steps of each recipe, and of a library's user, on a pretended GPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

import embedtrain as et
from embedtrain.data.bags import Bags
from embedtrain.data.click_batches import ClickBatch
from embedtrain.data.retrieval_batches import DrawOptions, RetrievalBatches
from embedtrain.data.skipgram import SamplingOptions, TextBatch, TextSampler, sampling_tables
from embedtrain.distributed.ranks import Ranks
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.sample_text import TextSample
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.ranking.model import NetworkOptions, Ranking
from embedtrain.recipes.retrieval.model import Retrieval, Scoring, Side
from embedtrain.recipes.word2vec.model import INPUT, OUTPUT, Word2Vec
from embedtrain.train.ahead import BatchesAhead
from embedtrain.train.step import train_step
from embedtrain.train.task import Task
from embedtrain.train.trainer import _Window
from tests.fake_cuda.device import Collective, FakeDevice, Wait

NUM_STEPS = 3
NUM_ROWS = 60


@dataclass
class Record:
    """What one rank's device saw: hazards of all steps, waits and collectives of the last, and the losses."""

    hazards: list[str]
    waits: list[Wait]
    launches: list[str]
    collectives: list[Collective]
    unordered_sums: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


class _Text:
    steps_per_epoch = 100
    examples_per_epoch = 2000

    def __init__(self, ranks: Ranks) -> None:
        self._rank = ranks.rank

    def batch(self, epoch: int, step: int) -> TextBatch:
        """Returns blocks that are shorter on the second rank, whose third one is empty."""
        n = 12 - 4 * self._rank if step != 2 or self._rank == 0 else 0
        generator = torch.Generator().manual_seed(10 * step + self._rank)
        words = torch.randint(0, NUM_ROWS, (n,), generator=generator)
        targets = torch.cat([words.view(n, 1), torch.randint(0, NUM_ROWS, (n, 2), generator=generator)], dim=1)
        positions = torch.arange(n)
        return TextBatch(TextSample(words, targets, (positions - 2).clamp(min=0), (positions + 3).clamp(max=n)), n)


class _DrawnText:
    """Blocks of text whose negatives are drawn where the model is."""

    steps_per_epoch = 100
    examples_per_epoch = 2000

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        options = SamplingOptions(window=2, negatives=2, sample=0.0)
        self._sampler = TextSampler(sampling_tables(np.arange(NUM_ROWS, 0, -1), options), options, device)
        self._rank = ranks.rank

    def batch(self, epoch: int, step: int) -> TextBatch:
        n = 12 - 4 * self._rank if step != 2 or self._rank == 0 else 0
        tokens = (torch.arange(n) * (step + 3) + self._rank) % NUM_ROWS
        return self._sampler(tokens.int(), torch.arange(n), key=step)


class _Clicks:
    steps_per_epoch = 100
    examples_per_epoch = 800

    def __init__(self, ranks: Ranks) -> None:
        self._rank, self._size = ranks.rank, ranks.size

    def batch(self, epoch: int, step: int) -> ClickBatch:
        n = 4 - self._rank if step != 2 or self._rank == 0 else 0
        generator = torch.Generator().manual_seed(10 * step + self._rank)
        features = features_of(n, generator, 3)
        labels = torch.randint(0, 2, (n,), generator=generator).float()
        return ClickBatch(labels, torch.randn(n, 2, generator=generator), features, max(n * self._size, 1))


def features_of(n: int, generator: torch.Generator, num_single: int) -> dict[str, et.Jagged]:
    """Returns features of one id each, and one of bags."""
    ids = {
        f"c{i}": et.Jagged.from_ids(torch.randint(0, NUM_ROWS, (n,), generator=generator)) for i in range(num_single)
    }
    lengths = torch.randint(0, 3, (n,), generator=generator)
    return {**ids, "tags": et.Jagged(torch.randint(0, NUM_ROWS, (int(lengths.sum()),), generator=generator), lengths)}


def _word2vec(
    ranks: Ranks,
    device: torch.device,
    architecture: Any,
    is_drawn: bool = False,
    is_damped: bool = False,
    **options: Any,
) -> Task:
    model = Word2Vec(NUM_ROWS, 8, architecture=architecture, device=device, ranks=ranks, **options)
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1, initial_accumulator_value=0.1)
    if is_damped:
        optimizer.preconditioner = et.optim.CurvatureDamping({INPUT: OUTPUT})
        model.counts_rows = True
    return Task(model, model.tables, optimizer, _DrawnText(ranks, device) if is_drawn else _Text(ranks))


def _retrieval(ranks: Ranks, device: torch.device, hidden: tuple[int, ...], **options: Any) -> Task:
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 5, 40)
    starts = np.concatenate([[0], lengths.cumsum()])
    known = Bags(starts, generator.integers(0, NUM_ROWS, int(starts[-1])))
    genres = {"genre": (Bags(np.arange(NUM_ROWS + 1), generator.integers(0, 5, NUM_ROWS)), 5)} if hidden else {}
    model = Retrieval(
        Side(40, {}, hidden), Side(NUM_ROWS, genres, hidden), 8, Scoring(), device=device, ranks=ranks, **options
    )
    batches = RetrievalBatches(
        known, NUM_ROWS, DrawOptions(12, 4, 8, in_batch=True), seed=1, rank=ranks.rank, world_size=ranks.size
    )
    dense = DenseOptimizer(model.dense, ranks=ranks) if hidden else None
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1, initial_accumulator_value=0.1)
    return Task(model, model.tables, optimizer, batches, dense=dense)


def _ranking(ranks: Ranks, device: torch.device, pool_at: Any, **options: Any) -> Task:
    tables = [et.TableSpec(f"c{i}", NUM_ROWS, 8) for i in range(3)] + [et.TableSpec("tag", NUM_ROWS, 8)]
    features = [et.FeatureSpec(f"c{i}", pooling="sum") for i in range(3)]
    features.append(et.FeatureSpec("tags", table="tag", pooling="mean", pool_at=pool_at))
    model = Ranking(tables, features, 2, NetworkOptions(top=(8,)), device=device, ranks=ranks, **options)
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1, initial_accumulator_value=0.1)
    return Task(model, model.tables, optimizer, _Clicks(ranks), dense=DenseOptimizer(model.network, ranks=ranks))


RECIPES: dict[str, Callable[..., Task]] = {
    "skip-gram": functools.partial(_word2vec, architecture="skipgram"),
    "skip-gram, drawn on the device": functools.partial(_word2vec, architecture="skipgram", is_drawn=True),
    "skip-gram, damped": functools.partial(_word2vec, architecture="skipgram", is_drawn=True, is_damped=True),
    "CBOW": functools.partial(_word2vec, architecture="cbow"),
    "CBOW, damped, rows on the host": functools.partial(
        _word2vec, architecture="cbow", is_damped=True, placement="host", cache_bytes=1500
    ),
    "retrieval": functools.partial(_retrieval, hidden=()),
    "two towers": functools.partial(_retrieval, hidden=(8,)),
    "ranking": functools.partial(_ranking, pool_at="auto"),
    "ranking, owners pool": functools.partial(_ranking, pool_at="owner"),
    # Some rows are hot and some are cold.
    "skip-gram, rows on the host": functools.partial(
        _word2vec, architecture="skipgram", placement="host", cache_bytes=1500
    ),
    "ranking, rows on the host": functools.partial(_ranking, pool_at="auto", placement="host", cache_bytes=3000),
}


def train_recipe(name: str, device: FakeDevice | None, ranks: Ranks, **options: Any) -> Record:
    """Trains a recipe for some steps as a `Trainer` does, on a device, or on the CPU."""
    task = RECIPES[name](ranks, torch.device("cpu" if device is None else "cuda"), **options)
    task.optimizer.looks_later = device is not None
    ahead, window = BatchesAhead(task), _Window()
    totals = []
    for step in range(NUM_STEPS):
        if device is not None and step == NUM_STEPS - 1:
            device.forget_step()
        prepared = ahead.take(0, step)
        meanwhile = functools.partial(ahead.prepare_next, 0, step + 1)
        objective = train_step(task.model, task.optimizer, prepared.batch, task.dense, 1.0, meanwhile)
        window.add(objective, prepared.num_examples)
        totals.append(objective.total)
    record = record_of(device)
    record.losses = [float(total) for total in totals]
    return record


def record_of(device: FakeDevice | None) -> Record:
    """Returns what a device saw so far."""
    if device is None:
        return Record([], [], [], [])
    record = Record([*device.hazards], [*device.waits], [*device.launches], [*device.collectives])
    record.unordered_sums = [*device.unordered_sums]
    return record


def train_library(
    device: FakeDevice | None, ranks: Ranks, *, ids_are_on_host: bool = False, is_ahead: bool = False
) -> Record:
    """Trains a collection of nine features as a user of the library does.

    Args:
        device: of the tables; None for the CPU.
        ranks: those that share the tables.
        ids_are_on_host: whether batches are in the host's memory, and not on the device.
        is_ahead: whether each batch is asked for when the step before it has begun its update.
    """
    where = torch.device("cpu" if device is None else "cuda")
    num_steps = 3
    tables = [et.TableSpec(f"c{i}", NUM_ROWS, 8) for i in range(8)] + [et.TableSpec("tag", NUM_ROWS, 8)]
    features = [et.FeatureSpec(f"c{i}", pooling="sum") for i in range(8)]
    features.append(et.FeatureSpec("tags", table="tag", pooling="mean"))
    collection = et.EmbeddingCollection(tables, features, device=where, ranks=ranks)
    optimizer = et.optim.RowwiseAdagrad(collection, lr=0.1, initial_accumulator_value=0.1)
    batches = []
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(10 * step + ranks.rank)
        made = features_of(3 - ranks.rank, generator, 8)
        if not ids_are_on_host:
            # As a loader on the device would give them: nobody has looked at ids and lengths.
            made = {
                name: et.Jagged(to_device(bags.values, where), to_device(bags.lengths, where))
                for name, bags in made.items()
            }
        batches.append({name: bags if name == "tags" else bags.values for name, bags in made.items()})
    totals = []
    asked = collection.ask(batches[0], is_ahead=True) if is_ahead else None
    for step, batch in enumerate(batches):
        if device is not None and step == num_steps - 1:
            device.forget_step()
        vectors = collection(batch) if asked is None else collection.look_up(asked)
        total = sum(own.square().sum() for own in vectors.values())
        total.backward()
        optimizer.step()
        if is_ahead:
            asked = collection.ask(batches[(step + 1) % num_steps], is_ahead=True)
        optimizer.zero_grad()
        totals.append(total.detach())
    record = record_of(device)
    record.losses = [float(total) for total in totals]
    return record
