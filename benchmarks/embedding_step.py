"""A step of embedding training on one rank, beside FBGEMM's CPU tables and torch.nn.EmbeddingBag.

    python benchmarks/embedding_step.py --quick

A step looks up bags of ids (sums), runs backward from a given gradient and applies row-wise Adagrad. The sides take
turns, step by step, on the same ids; the figures are medians, with the spread between quartiles. The last column is
the row update's share of the time that reading and writing the same rows takes, and nothing else.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from record import Measure, append_results
from torch import Tensor

import embedtrain as et
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.rowwise_adagrad import RowwiseAdagradStep, rowwise_adagrad

LR, EPS = 0.01, 1e-8
NUM_BATCHES = 4
"""Batches that the steps go round, so that no batch's rows are still in the cache."""
Step = Callable[[int], None]


@dataclass(frozen=True)
class Cell:
    """A point of the grid."""

    num_tables: int
    num_rows: int
    dim: int
    batch_size: int
    bag_size: int
    is_zipf: bool
    threads: int

    def __str__(self) -> str:
        ids = "zipf" if self.is_zipf else "uniform"
        return f"{self.num_tables}x{self.num_rows}x{self.dim} batch {self.batch_size} bag {self.bag_size} {ids}"

    @property
    def num_bytes(self) -> int:
        """Of the rows and of a step's pooled vectors."""
        return 4 * self.num_tables * self.dim * (self.num_rows + 4 * self.batch_size)


@dataclass(frozen=True)
class Batch:
    """The ids of a step and the gradient of its pooled vectors; [num_tables, batch_size, bag_size] and [.., dim]."""

    ids: Tensor
    grad: Tensor


def main() -> None:
    """Measures the grid, prints a table and records it."""
    options = parse_options()
    probe = build_probe()
    measures: list[Measure] = []
    print("| cell | threads | ours, ms | FBGEMM / ours | EmbeddingBag / ours | share of row bound |")
    print("| --- | --- | --- | --- | --- | --- |")
    for cell in grid(options.quick, options.threads):
        if cell.num_bytes * 2.2 > options.memory_gib * 2**30:
            print(f"| {cell} | {cell.threads} | needs more memory than --memory-gib: left out | | | |")
            continue
        measures += measure(cell, options.repeats, probe)
    for peer in ("FBGEMM", "EmbeddingBag"):
        ratios = [m.ratio for m in measures if peer in m.metric]
        if ratios:
            print(f"\n{peer}: geometric mean {statistics.geometric_mean(ratios):.2f}, least {min(ratios):.2f}")
    append_results("embedding_step", f"torch {torch.__version__}, fbgemm-gpu-cpu 1.8.0", measures)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="A step on one rank, beside FBGEMM and EmbeddingBag.")
    parser.add_argument("--quick", action="store_true", help="a few cells of the grid")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--memory-gib", type=float, default=16.0, help="larger cells are left out")
    return parser.parse_args()


def grid(quick: bool, threads: list[int]) -> list[Cell]:
    """Returns the cells; the quick ones are of the small batch, with one large."""
    tables, dims, batches = (1, 26), (32, 64, 128), (4096, 65536)
    cells = [
        Cell(num_tables, 1_000_000, dim, batch, bag, is_zipf, num_threads)
        for num_tables, dim, batch, bag, is_zipf, num_threads in itertools.product(
            tables, dims, batches, (1, 20), (True, False), threads
        )
    ]
    if not quick:
        return cells
    chosen = {(1, 32, 4096), (1, 64, 4096), (1, 128, 65536), (26, 64, 4096)}
    return [cell for cell in cells if (cell.num_tables, cell.dim, cell.batch_size) in chosen]


def measure(cell: Cell, repeats: int, probe: Callable[[Tensor, Tensor], None]) -> list[Measure]:
    """Runs the sides in turn and prints the cell's line."""
    torch.set_num_threads(cell.threads)
    batches = [make_batch(cell, seed) for seed in range(NUM_BATCHES)]
    sides = {"ours": ours(cell, batches), "FBGEMM": fbgemm(cell, batches)}
    if cell.num_tables == 1:
        # At 26 tables one step takes minutes' worth of repeats: the sums of all-duplicate sparse gradients.
        sides["EmbeddingBag"] = embedding_bag(cell, batches)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, step in sides.items():
            start = time.perf_counter()
            step(repeat % NUM_BATCHES)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    share = share_of_bound(cell, batches, probe) if cell.threads == 1 and cell.num_tables == 1 else None
    return report(cell, seconds, share)


def report(cell: Cell, seconds: dict[str, list[float]], share: tuple[float, float] | None) -> list[Measure]:
    """Prints the line of a cell and returns its measures."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    cells = []
    for name in ("FBGEMM", "EmbeddingBag"):
        if name in medians:
            low, _, high = statistics.quantiles(
                [peer / own for peer, own in zip(seconds[name], seconds["ours"], strict=True)], n=4
            )
            cells.append(f"{medians[name] / medians['ours']:.2f} ({low:.2f} to {high:.2f})")
        else:
            cells.append("")
    cells.append("" if share is None else f"{share[1] / share[0]:.2f}")
    print(f"| {cell} | {cell.threads} | {medians['ours'] * 1e3:.2f} | {' | '.join(cells)} |", flush=True)
    own = medians["ours"]
    measures = [
        Measure(str(cell), f"step seconds, {name}", own, medians[name], medians[name] / own, 1, cell.threads)
        for name in medians
        if name != "ours"
    ]
    if share is not None:
        measures.append(Measure(str(cell), "row update seconds, row bound", *share, share[1] / share[0], 1, 1))
    return measures


def make_batch(cell: Cell, seed: int) -> Batch:
    """Draws ids; Zipf's are ranks of frequency, as a vocabulary's are."""
    generator = np.random.default_rng(seed)
    shape = (cell.num_tables, cell.batch_size, cell.bag_size)
    if cell.is_zipf:
        weights = np.arange(1, cell.num_rows + 1, dtype=np.float64) ** -1.05
        cumulative = np.cumsum(weights)
        drawn = np.searchsorted(cumulative, generator.random(shape) * cumulative[-1]).clip(0, cell.num_rows - 1)
    else:
        drawn = generator.integers(0, cell.num_rows, shape)
    grad = torch.randn(cell.num_tables, cell.batch_size, cell.dim) * 0.01
    return Batch(torch.from_numpy(drawn.astype(np.int64)), grad)


def ours(cell: Cell, batches: list[Batch]) -> Step:
    """Returns our step."""
    names = [str(number) for number in range(cell.num_tables)]
    tables = et.EmbeddingCollection(
        [et.TableSpec(name, cell.num_rows, cell.dim) for name in names],
        [et.FeatureSpec(name, pooling="sum") for name in names],
    )
    optimizer = et.optim.RowwiseAdagrad(tables, lr=LR, eps=EPS)
    lengths = torch.full((cell.batch_size,), cell.bag_size)
    inputs = [
        {name: et.Jagged(ids.flatten(), lengths) for name, ids in zip(names, batch.ids, strict=True)}
        for batch in batches
    ]

    def step(number: int) -> None:
        pooled = tables(inputs[number])
        torch.autograd.backward(list(pooled.values()), list(batches[number].grad))
        optimizer.step()
        optimizer.zero_grad()

    return step


def fbgemm(cell: Cell, batches: list[Batch]) -> Step:
    """Returns FBGEMM's step, whose backward is its update too."""
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(cell.num_rows, cell.dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * cell.num_tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
    )
    module.init_embedding_weights_uniform(-0.01, 0.01)
    num_bags = cell.num_tables * cell.batch_size
    offsets = torch.arange(num_bags + 1) * cell.bag_size
    inputs = [batch.ids.flatten() for batch in batches]
    # Its pooled vectors lie table beside table in each row.
    grads = [batch.grad.transpose(0, 1).reshape(cell.batch_size, -1).contiguous() for batch in batches]

    def step(number: int) -> None:
        module(inputs[number], offsets).backward(grads[number])

    return step


def embedding_bag(cell: Cell, batches: list[Batch]) -> Step:
    """Returns the step of sparse gradients and a row-wise Adagrad on them, as one writes it in PyTorch."""
    bag = torch.nn.EmbeddingBag(cell.num_rows, cell.dim, mode="sum", sparse=True)
    accumulator = torch.zeros(cell.num_rows)

    def step(number: int) -> None:
        bag(batches[number].ids[0]).backward(batches[number].grad[0])
        assert bag.weight.grad is not None
        sparse = bag.weight.grad.coalesce()
        rows, grad = sparse.indices()[0], sparse.values()
        with torch.no_grad():
            state = accumulator[rows] + grad.square().mean(dim=1)
            accumulator[rows] = state
            bag.weight.index_add_(0, rows, grad * (-LR / (state.sqrt() + EPS)).unsqueeze(1))
        bag.weight.grad = None

    return step


def build_probe() -> Callable[[Tensor, Tensor], None]:
    """Compiles the probe of the bound."""
    source = Path(__file__).with_name("row_probe.cpp")
    library = Path(tempfile.mkdtemp()) / "row_probe.so"
    subprocess.run(["g++", "-O3", "-march=native", "-fPIC", "-shared", str(source), "-o", str(library)], check=True)
    touch = ctypes.CDLL(str(library)).touch_rows
    touch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]

    def probe(table: Tensor, rows: Tensor) -> None:
        touch(table.data_ptr(), rows.data_ptr(), rows.numel(), table.shape[1])

    return probe


def share_of_bound(cell: Cell, batches: list[Batch], probe: Callable[[Tensor, Tensor], None]) -> tuple[float, float]:
    """Returns the seconds of the row update and of the probe, medians of alternate runs on the same rows and memory."""
    tables = et.EmbeddingCollection([et.TableSpec("rows", cell.num_rows, cell.dim)])
    weight, accumulator = tables.row_groups[0].weight, torch.zeros(cell.num_rows)
    inputs = []
    for batch in batches:
        rows = torch.unique(tables.row_groups[0].keys_of([0], [batch.ids.flatten()])[0])
        inputs.append((rows, torch.randn(rows.numel(), cell.dim) * 0.01))
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(12):
        rows, grad = inputs[number % NUM_BATCHES]
        start = time.perf_counter()
        gradient = RowGradient.of_rows(rows, grad, weight.shape[0])
        rowwise_adagrad(weight, accumulator, gradient, RowwiseAdagradStep(lr=LR, eps=EPS))
        between = time.perf_counter()
        probe(weight, inputs[(number + 1) % NUM_BATCHES][0])
        seconds[0].append(between - start)
        seconds[1].append(time.perf_counter() - between)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


if __name__ == "__main__":
    main()
