"""Ranking on sharded tables against the same model on plain embedding bags, and what a step sends."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import embedtrain as et
from embedtrain.data.click_batches import ClickBatch
from embedtrain.data.partition import share_of_rank
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import job_ranks
from embedtrain.distributed.shared_memory import VARIABLE
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes.ranking.model import NetworkOptions, Ranking, build_network
from embedtrain.testing.ranks import run_ranks
from embedtrain.testing.threads import run_threads
from embedtrain.train.step import train_step

STEPS, BATCH, NUM_DENSE = 6, 25, 3
NUM_ROWS = {"shop": 40, "user": 101, "tags": 23}
FEATURES = [et.FeatureSpec("shop"), et.FeatureSpec("user"), et.FeatureSpec("tags", pooling="sum")]
DIM = 8
START = 0.1
"""Of the accumulators. From zero, a first step has the length `lr` however small the gradient: one that is nothing but
the rounding of its sum would turn the order of additions into a difference in the weights."""
TABLES = [et.TableSpec(name, rows, DIM) for name, rows in NUM_ROWS.items()]
OPTIONS = {
    "dlrm": NetworkOptions(architecture="dlrm", bottom=(8,), top=(16, 8)),
    "dcn_v2": NetworkOptions(architecture="dcn_v2", top=(16,), num_cross_layers=2),
    "low_rank": NetworkOptions(architecture="dcn_v2", top=(16,), num_cross_layers=2, low_rank=3),
}


def global_batch(step: int) -> ClickBatch:
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(0, 4, (BATCH,), generator=generator)
    ids = {name: torch.randint(rows, (BATCH,), generator=generator) for name, rows in NUM_ROWS.items()}
    features = {name: et.Jagged.from_ids(ids[name]) for name in ("shop", "user")}
    features["tags"] = et.Jagged(torch.randint(NUM_ROWS["tags"], (int(lengths.sum()),), generator=generator), lengths)
    dense = torch.randn(BATCH, NUM_DENSE, generator=generator)
    labels = (ids["shop"] % 2 == 0).float()
    return ClickBatch(labels, dense, features, BATCH)


def part_of(batch: ClickBatch, rank: int, world_size: int) -> ClickBatch:
    """The examples of a rank; 25 do not divide by 2 or 3."""
    mine = share_of_rank(BATCH, rank, world_size)
    features = {}
    for name, bags in batch.features.items():
        pieces = bags.values.split(bags.lengths.tolist())[mine.start : mine.stop]
        features[name] = et.Jagged(torch.cat(pieces), bags.lengths[mine.start : mine.stop])
    return ClickBatch(batch.labels[mine.start : mine.stop], batch.dense[mine.start : mine.stop], features, BATCH)


def train_sharded(ranks: Ranks, kind: str, options: NetworkOptions) -> list[dict[str, Tensor]]:
    """Returns weights and loss after each step."""
    model = Ranking(TABLES, FEATURES, NUM_DENSE, options, ranks=ranks, seed=5)
    optimizer = getattr(et.optim, kind)(model.tables, lr=0.1, eps=1e-8, initial_accumulator_value=START)
    dense = DenseOptimizer(model.network, ranks=ranks, name="adam", lr=0.01)
    history = []
    for step in range(STEPS):
        batch = part_of(global_batch(step), ranks.rank, ranks.size)
        objective = train_step(model, optimizer, batch, dense)
        total = objective.total.clone()
        ranks.all_reduce(total)
        history.append(
            {
                "loss": total / BATCH,
                **{name: model.tables.gather_table(name).clone() for name in NUM_ROWS},
                **{name: value.clone() for name, value in model.network.state_dict().items()},
            }
        )
    return history


class PlainRanking(nn.Module):
    """The same network on `nn.EmbeddingBag`s of the same first values."""

    def __init__(self, options: NetworkOptions) -> None:
        super().__init__()
        first = et.EmbeddingCollection(TABLES, FEATURES, seed=5)
        self.bags = nn.ModuleDict(
            {
                name: nn.EmbeddingBag.from_pretrained(first.gather_table(name).clone(), freeze=False, mode="sum")
                for name in NUM_ROWS
            }
        )
        self.network = build_network(NUM_DENSE, [DIM] * len(NUM_ROWS), options, seed=5)

    def forward(self, batch: ClickBatch) -> Tensor:
        vectors: Sequence[Tensor] = [
            self.bags[name](bags.values, bags.lengths.cumsum(0) - bags.lengths) for name, bags in batch.features.items()
        ]
        logits = self.network(batch.dense, vectors)
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)


def train_plain(options: NetworkOptions) -> list[dict[str, Tensor]]:
    """Element-wise Adagrad, torch's own."""
    model = PlainRanking(options)
    optimizers = [
        torch.optim.Adagrad(model.bags.parameters(), lr=0.1, eps=1e-8, initial_accumulator_value=START),
        torch.optim.Adam(model.network.parameters(), lr=0.01),
    ]
    history = []
    for step in range(STEPS):
        loss = model(global_batch(step))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append(
            {
                "loss": loss.detach().double(),
                **{name: bag.weight.detach().clone() for name, bag in model.bags.items()},
                **{name: value.clone() for name, value in model.network.state_dict().items()},
            }
        )
    return history


def train_oracle(options: NetworkOptions) -> list[dict[str, Tensor]]:
    """Row-wise Adagrad, which torch has not: the unsharded oracle's."""
    tables = et.UnshardedEmbeddingCollection(TABLES, FEATURES, seed=5)
    network = build_network(NUM_DENSE, [DIM] * len(NUM_ROWS), options, seed=5)
    optimizers = [
        et.optim.RowwiseAdagrad(tables, lr=0.1, eps=1e-8, initial_accumulator_value=START),
        torch.optim.Adam(network.parameters(), lr=0.01),
    ]
    history = []
    for step in range(STEPS):
        batch = global_batch(step)
        vectors = tables(batch.features)
        logits = network(batch.dense, list(vectors.values()))
        loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        history.append(
            {
                "loss": loss.detach().double(),
                **{name: tables.gather_table(name).clone() for name in NUM_ROWS},
                **{name: value.clone() for name, value in network.state_dict().items()},
            }
        )
    return history


def assert_same_at_each_step(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            torch.testing.assert_close(
                ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}"
            )


def train_all(ranks: Ranks) -> dict[tuple[str, str], list[dict[str, Tensor]]]:
    kinds = ("Adagrad", "RowwiseAdagrad")
    return {(name, kind): train_sharded(ranks, kind, options) for name, options in OPTIONS.items() for kind in kinds}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranking_equals_plain_torch_and_the_oracle_step_by_step(world_size: int) -> None:
    ranks = run_threads(world_size, train_all)
    for name, options in OPTIONS.items():
        for kind, expected in (("Adagrad", train_plain(options)), ("RowwiseAdagrad", train_oracle(options))):
            for histories in ranks:
                assert_same_at_each_step(histories[name, kind], expected)


def count_collectives(ranks: Ranks) -> dict[str, int]:
    """Counts what a step of 26 features of one dim sends, the way that ranks of several hosts take."""
    os.environ[VARIABLE] = "0"
    ranks = job_ranks()
    names = [f"C{i}" for i in range(26)]
    model = Ranking(
        [et.TableSpec(name, 50, 4) for name in names],
        [et.FeatureSpec(name) for name in names],
        NUM_DENSE,
        OPTIONS["dlrm"],
        ranks=ranks,
    )
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1)
    dense = DenseOptimizer(model.network, ranks=ranks)
    ids = torch.arange(8)
    batch = ClickBatch(
        torch.ones(8), torch.zeros(8, NUM_DENSE), {name: et.Jagged.from_ids(ids) for name in names}, num_global=16
    )
    counts: dict[str, int] = {}
    for name in ("all_to_all_single", "all_reduce", "all_gather", "broadcast"):
        _count_calls(name, counts)
    train_step(model, optimizer, batch, dense)
    return counts


def _count_calls(name: str, counts: dict[str, int]) -> None:
    collective = getattr(dist, name)
    counts[name] = 0

    def counted(*args: object, **kwargs: object) -> object:
        counts[name] += 1
        return collective(*args, **kwargs)

    setattr(dist, name, counted)


def test_26_features_of_one_dim_cost_one_exchange() -> None:
    for counts in run_ranks(2, count_collectives):
        # Sizes, ids, vectors, gradients; the network's gradients, and the agreement that all of them are finite.
        assert counts == {"all_to_all_single": 4, "all_reduce": 2, "all_gather": 0, "broadcast": 0}
