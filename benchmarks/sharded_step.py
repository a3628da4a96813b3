"""A step of embedding training on two ranks over Gloo, beside TorchRec's row-wise and table-wise sharding.

    python benchmarks/sharded_step.py --quick

A step exchanges ids, looks up bags (sums), exchanges vectors, runs backward from a given gradient, exchanges gradients
and applies row-wise Adagrad. The sides take turns, step by step, on the same ids; a step takes as long as its slowest
rank; the figures are medians, with the spread between quartiles.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from record import Measure, append_results
from torch import Tensor

import embedtrain as et

LR, EPS = 0.01, 1e-8
WORLD_SIZE = 2
BATCH_SIZE = 2048
NUM_BATCHES = 4
"""Batches that the steps go round, so that no batch's rows are still in the cache."""
Step = Callable[[int], None]


@dataclass(frozen=True)
class Cell:
    """A point of the grid; batches are of `BATCH_SIZE` examples a rank."""

    num_tables: int
    num_rows: int
    dim: int
    bag_size: int
    is_zipf: bool

    def __str__(self) -> str:
        ids = "zipf" if self.is_zipf else "uniform"
        return f"{self.num_tables}x{self.num_rows}x{self.dim} batch {BATCH_SIZE} a rank bag {self.bag_size} {ids}"

    @property
    def names(self) -> list[str]:
        """Of the tables, and of the features that look them up."""
        return [f"t{number}" for number in range(self.num_tables)]


@dataclass(frozen=True)
class Batch:
    """A rank's ids, [num_tables, BATCH_SIZE, bag_size], and the gradient of its vectors, [num_tables, .., dim]."""

    ids: Tensor
    grad: Tensor


def main() -> None:
    """Measures the grid on ranks of its own, prints a table and records it."""
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_rank, (folder, options), nprocs=WORLD_SIZE)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="A step on two ranks, beside TorchRec.")
    parser.add_argument("--quick", action="store_true", help="the cells of 4 tables only")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


def run_rank(rank: int, folder: str, options: argparse.Namespace) -> None:
    """Runs the grid on one rank; the first reports."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    store = dist.FileStore(str(Path(folder) / "store"), WORLD_SIZE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD_SIZE)
    measures: list[Measure] = []
    if rank == 0:
        print("| cell | ours, ms | TorchRec row-wise / ours | TorchRec table-wise / ours |\n| --- | --- | --- | --- |")
    for cell in grid(options):
        seconds = measure(cell, rank, options.repeats)
        if rank == 0:
            measures += report(cell, seconds)
    if rank == 0:
        for way in ("row-wise", "table-wise"):
            ratios = [m.ratio for m in measures if way in m.metric]
            print(f"\nTorchRec {way}: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
        append_results("sharded_step", f"torch {torch.__version__}, torchrec 1.8.0, fbgemm-gpu-cpu 1.8.0", measures)
    dist.destroy_process_group()


def grid(options: argparse.Namespace) -> list[Cell]:
    """Returns the cells."""
    tables = [(4, 1_000_000)] if options.quick else [(4, 1_000_000), (26, 200_000)]
    return [
        Cell(num_tables, num_rows, options.dim, bag_size, is_zipf)
        for (num_tables, num_rows), bag_size, is_zipf in itertools.product(tables, (1, 20), (True, False))
    ]


def measure(cell: Cell, rank: int, repeats: int) -> dict[str, list[float]]:
    """Runs the sides in turn; returns the seconds of each step, of its slowest rank."""
    batches = [make_batch(cell, WORLD_SIZE * number + rank) for number in range(NUM_BATCHES)]
    sides = {
        "ours": ours(cell, batches),
        "TorchRec row-wise": torchrec_step(cell, batches, "row-wise"),
        "TorchRec table-wise": torchrec_step(cell, batches, "table-wise"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(-2, repeats):
        for name, step in sides.items():
            dist.barrier()
            start = time.perf_counter()
            step(repeat % NUM_BATCHES)
            slowest = torch.tensor(time.perf_counter() - start)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            if repeat >= 0:
                seconds[name].append(float(slowest))
    return seconds


def report(cell: Cell, seconds: dict[str, list[float]]) -> list[Measure]:
    """Prints the line of a cell and returns its measures."""
    own = statistics.median(seconds["ours"])
    columns, measures = [], []
    for name, values in seconds.items():
        if name == "ours":
            continue
        peer = statistics.median(values)
        low, _, high = statistics.quantiles([a / b for a, b in zip(values, seconds["ours"], strict=True)], n=4)
        columns.append(f"{peer / own:.2f} ({low:.2f} to {high:.2f})")
        measures.append(Measure(str(cell), f"step seconds, {name}", own, peer, peer / own, WORLD_SIZE, 1))
    print(f"| {cell} | {own * 1e3:.2f} | {' | '.join(columns)} |", flush=True)
    return measures


def make_batch(cell: Cell, seed: int) -> Batch:
    """Draws ids; Zipf's are ranks of frequency, as a vocabulary's are."""
    generator = np.random.default_rng(seed)
    shape = (cell.num_tables, BATCH_SIZE, cell.bag_size)
    if cell.is_zipf:
        cumulative = np.cumsum(np.arange(1, cell.num_rows + 1, dtype=np.float64) ** -1.05)
        drawn = np.searchsorted(cumulative, generator.random(shape) * cumulative[-1]).clip(0, cell.num_rows - 1)
    else:
        drawn = generator.integers(0, cell.num_rows, shape)
    return Batch(torch.from_numpy(drawn.astype(np.int64)), torch.randn(cell.num_tables, BATCH_SIZE, cell.dim) * 0.01)


def ours(cell: Cell, batches: list[Batch]) -> Step:
    """Returns our step."""
    tables = et.EmbeddingCollection(
        [et.TableSpec(name, cell.num_rows, cell.dim) for name in cell.names],
        [et.FeatureSpec(name, pooling="sum") for name in cell.names],
    )
    optimizer = et.optim.RowwiseAdagrad(tables, lr=LR, eps=EPS)
    lengths = torch.full((BATCH_SIZE,), cell.bag_size)
    inputs = [
        {name: et.Jagged(ids.flatten(), lengths) for name, ids in zip(cell.names, batch.ids, strict=True)}
        for batch in batches
    ]

    def step(number: int) -> None:
        pooled = tables(inputs[number])
        torch.autograd.backward(list(pooled.values()), list(batches[number].grad))
        optimizer.step()
        optimizer.zero_grad()

    return step


def torchrec_step(cell: Cell, batches: list[Batch], sharding: str) -> Step:
    """Returns TorchRec's step, whose backward is its update too; the plan is made by hand."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
    from torchrec.distributed import DistributedModelParallel
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise, table_wise
    from torchrec.distributed.types import ShardingEnv, ShardingPlan

    configs = [
        EmbeddingBagConfig(name=name, embedding_dim=cell.dim, num_embeddings=cell.num_rows, feature_names=[name])
        for name in cell.names
    ]
    device = torch.device("cpu")
    bags = EmbeddingBagCollection(tables=configs, device=torch.device("meta"))
    sharder = EmbeddingBagCollectionSharder(
        fused_params={"optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD, "learning_rate": LR, "eps": EPS}
    )
    placement = {
        name: row_wise(compute_kernel="fused")
        if sharding == "row-wise"
        else table_wise(rank=number % WORLD_SIZE, compute_kernel="fused")
        for number, name in enumerate(cell.names)
    }
    plan = construct_module_sharding_plan(bags, placement, sharder, WORLD_SIZE, WORLD_SIZE, device_type="cpu")
    model = DistributedModelParallel(
        bags,
        env=ShardingEnv.from_process_group(dist.group.WORLD),
        device=device,
        plan=ShardingPlan(plan={"": plan}),
        sharders=[sharder],
    )
    lengths = torch.full((cell.num_tables * BATCH_SIZE,), cell.bag_size)
    inputs = [KeyedJaggedTensor(cell.names, batch.ids.flatten(), lengths=lengths) for batch in batches]
    # Its pooled vectors lie table beside table in each row.
    grads = [batch.grad.transpose(0, 1).reshape(BATCH_SIZE, -1).contiguous() for batch in batches]

    def step(number: int) -> None:
        model(inputs[number]).values().backward(grads[number])

    return step


if __name__ == "__main__":
    main()
