"""A step of embedding training on one rank, beside FBGEMM's CPU tables and torch.nn.EmbeddingBag.

    python benchmarks/embedding_step.py --quick

A step looks up bags of ids (sums), runs backward from a given gradient and applies row-wise Adagrad; EmbeddingBag has
sparse gradients and `torch.optim.Adagrad`. The sides take turns, step by step, on the same ids; the figures are
medians, with the spread between quartiles. Each shape has a process of its own, as a job has: how quickly a peer gets
memory for its vectors hangs on what its process freed before, by a factor of 2.5 in the largest. The last columns are
the shares of the row update's time in which the same rows can be read and written, and nothing else; and in which
gradients and accumulators, which an update cannot do without, are read and written too.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import itertools
import multiprocessing
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
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
from embedtrain.ops._backend.row_memory import allocate_rows
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_update import Moments, RowStep, moment_update
from embedtrain.sharding.layout import SpreadLayout

LR, EPS = 0.01, 1e-8
NUM_BATCHES = 2
"""Batches that the steps go round; between them a step of each other side touches as many rows."""
MIN_REPEATS, MAX_REPEATS, SECONDS_A_CELL = 5, 40, 2.0
POOL_SIZE = 1 << 22
"""Ids drawn one by one; batches take theirs from among them."""
Step = Callable[[int], None]
Side = Callable[["Cell", Sequence["Batch"]], Step]
"""Tables and their optimizer; makes the step of a cell on its batches."""


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
        """Of two sides' tables, and of a step's ids, vectors and gradients."""
        vectors = 6 * 4 * self.num_tables * self.batch_size * self.dim
        ids = (NUM_BATCHES + 4) * 8 * self.num_tables * self.batch_size * self.bag_size
        return 2 * 4 * self.num_tables * self.num_rows * (self.dim + 1) + vectors + ids


@dataclass(frozen=True)
class Batch:
    """The ids of a step and the gradient of its pooled vectors; [num_tables, batch_size, bag_size] and [.., dim]."""

    ids: Tensor
    grad: Tensor


def main() -> None:
    """Measures the grid, prints a table and records it."""
    options = parse_options()
    measures: list[Measure] = []
    print("| cell | threads | ours, ms | FBGEMM / ours | EmbeddingBag / ours | of row bound | of full bound |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        probe_path = compile_probe(Path(folder))
        for _, group in itertools.groupby(grid(options.quick, options.threads), key=str):
            cells = [cell for cell in group if fits(cell, options.memory_gib)]
            if cells:
                with ProcessPoolExecutor(1, mp_context=spawn) as process:
                    measures += process.submit(measure_shape, cells, probe_path).result()
    for peer in ("FBGEMM", "EmbeddingBag"):
        for threads in options.threads:
            ratios = [m.ratio for m in measures if peer in m.metric and m.threads == threads]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                print(f"\n{peer}, {threads} threads: geometric mean {mean:.2f}, least {min(ratios):.2f}")
    append_results("embedding_step", f"torch {torch.__version__}, fbgemm-gpu-cpu 1.8.0", measures)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="A step on one rank, beside FBGEMM and EmbeddingBag.")
    parser.add_argument("--quick", action="store_true", help="a few cells of the grid")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--memory-gib", type=float, default=20.0, help="larger cells are left out")
    return parser.parse_args()


def grid(quick: bool, threads: list[int]) -> list[Cell]:
    """Returns the cells, those of the same tables and of the same ids together."""
    tables, dims, batches = (1, 26), (32, 64, 128), (4096, 65536)
    cells = [
        Cell(num_tables, 1_000_000, dim, batch, bag, is_zipf, num_threads)
        for num_tables, dim, batch, bag, is_zipf, num_threads in itertools.product(
            tables, dims, batches, (1, 20), (True, False), threads
        )
    ]
    if not quick:
        return cells
    chosen = {(1, 32, 4096), (1, 128, 65536), (26, 64, 4096)}
    return [cell for cell in cells if (cell.num_tables, cell.dim, cell.batch_size) in chosen]


def fits(cell: Cell, memory_gib: float) -> bool:
    """Returns whether a cell fits into memory, and says so where it does not."""
    if cell.num_bytes <= memory_gib * 2**30:
        return True
    print(f"| {cell} | {cell.threads} | needs {cell.num_bytes / 2**30:.0f} GiB: left out | | | | |")
    return False


def measure_shape(cells: Sequence[Cell], probe_path: Path) -> list[Measure]:
    """Measures cells that differ in their threads alone."""
    num_tables, num_rows, dim = cells[0].num_tables, cells[0].num_rows, cells[0].dim
    sides = {"ours": ours(num_tables, num_rows, dim), "FBGEMM": fbgemm(num_tables, num_rows, dim)}
    if num_tables == 1:
        # At 26 tables one step takes minutes' worth of repeats: the sums of all-duplicate sparse gradients.
        sides["EmbeddingBag"] = embedding_bag(num_rows, dim)
    batches = [make_batch(cells[0], seed) for seed in range(NUM_BATCHES)]
    probe = load_probe(probe_path)
    return [found for cell in cells for found in measure(cell, batches, sides, probe)]


def measure(cell: Cell, batches: Sequence[Batch], sides: dict[str, Side], probe: Probe) -> list[Measure]:
    """Runs the sides in turn and prints the cell's line."""
    torch.set_num_threads(cell.threads)
    is_single = cell.threads == 1
    steps = {name: side(cell, batches) for name, side in sides.items() if name != "EmbeddingBag" or is_single}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    spent = 0.0
    for repeat in itertools.count(-1):
        if repeat >= MAX_REPEATS or (repeat >= MIN_REPEATS and spent > SECONDS_A_CELL):
            break
        for name, step in steps.items():
            start = time.perf_counter()
            step(repeat % NUM_BATCHES)
            taken = time.perf_counter() - start
            if repeat >= 0:
                seconds[name].append(taken)
                spent += taken
    bounds = time_of_bounds(cell, batches, probe) if is_single and cell.num_tables == 1 else None
    return report(cell, seconds, bounds)


def report(cell: Cell, seconds: dict[str, list[float]], bounds: tuple[float, float, float] | None) -> list[Measure]:
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
    cells += ["", ""] if bounds is None else [f"{bound / bounds[0]:.2f}" for bound in bounds[1:]]
    print(f"| {cell} | {cell.threads} | {medians['ours'] * 1e3:.2f} | {' | '.join(cells)} |", flush=True)
    own = medians["ours"]
    measures = [
        Measure(str(cell), f"step seconds, {name}", own, medians[name], medians[name] / own, 1, cell.threads)
        for name in medians
        if name != "ours"
    ]
    if bounds is not None:
        update = bounds[0]
        for name, bound in zip(("row bound", "bound with all it reads"), bounds[1:], strict=True):
            measures.append(Measure(str(cell), f"row update seconds, {name}", update, bound, bound / update, 1, 1))
    return measures


@functools.cache
def pool_of_ids(num_rows: int) -> Tensor:
    """Draws ids by Zipf's law with exponent 1.05; ids are ranks of frequency, as a vocabulary's are."""
    cumulative = np.cumsum(np.arange(1, num_rows + 1, dtype=np.float64) ** -1.05)
    drawn = np.searchsorted(cumulative, np.random.default_rng(0).random(POOL_SIZE) * cumulative[-1])
    return torch.from_numpy(drawn.clip(0, num_rows - 1).astype(np.int64))


def make_batch(cell: Cell, seed: int) -> Batch:
    """Draws the ids and the gradient of a step."""
    generator = torch.Generator().manual_seed(seed)
    shape = (cell.num_tables, cell.batch_size, cell.bag_size)
    bound = POOL_SIZE if cell.is_zipf else cell.num_rows
    ids = torch.randint(0, bound, shape, generator=generator)
    if cell.is_zipf:
        ids = pool_of_ids(cell.num_rows)[ids]
    grad = torch.randn(cell.num_tables, cell.batch_size, cell.dim, generator=generator) * 0.01
    return Batch(ids, grad)


def ours(num_tables: int, num_rows: int, dim: int) -> Side:
    """Returns our side."""
    names = [str(number) for number in range(num_tables)]
    tables = et.EmbeddingCollection(
        [et.TableSpec(name, num_rows, dim) for name in names],
        [et.FeatureSpec(name, pooling="sum") for name in names],
    )
    optimizer = et.optim.RowwiseAdagrad(tables, lr=LR, eps=EPS)

    def make_step(cell: Cell, batches: Sequence[Batch]) -> Step:
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

    return make_step


def fbgemm(num_tables: int, num_rows: int, dim: int) -> Side:
    """Returns FBGEMM's side, whose backward is its update too."""
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(num_rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)] * num_tables,
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=LR,
        eps=EPS,
        pooling_mode=PoolingMode.SUM,
    )
    module.init_embedding_weights_uniform(-0.01, 0.01)

    def make_step(cell: Cell, batches: Sequence[Batch]) -> Step:
        offsets = torch.arange(num_tables * cell.batch_size + 1) * cell.bag_size
        inputs = [batch.ids.flatten() for batch in batches]
        # Its pooled vectors lie table beside table in each row.
        grads = [batch.grad.transpose(0, 1).reshape(cell.batch_size, -1).contiguous() for batch in batches]

        def step(number: int) -> None:
            module(inputs[number], offsets).backward(grads[number])

        return step

    return make_step


def embedding_bag(num_rows: int, dim: int) -> Side:
    """Returns the side of one table in plain PyTorch: sparse gradients, and its Adagrad, which takes them."""
    bag = torch.nn.EmbeddingBag(num_rows, dim, mode="sum", sparse=True)
    optimizer = torch.optim.Adagrad(bag.parameters(), lr=LR, eps=EPS)

    def make_step(cell: Cell, batches: Sequence[Batch]) -> Step:
        def step(number: int) -> None:
            bag(batches[number].ids[0]).backward(batches[number].grad[0])
            optimizer.step()
            optimizer.zero_grad()

        return step

    return make_step


@dataclass(frozen=True)
class Probe:
    """What rows can be read and written in: alone, and with accumulators and gradients."""

    rows: Callable[[Tensor, Tensor], None]
    all: Callable[[Tensor, Tensor, Tensor, Tensor], None]


def compile_probe(folder: Path) -> Path:
    """Compiles the probe of the bounds and returns where it is."""
    source, path = Path(__file__).with_name("row_probe.cpp"), folder / "row_probe.so"
    subprocess.run(["g++", "-O3", "-march=native", "-fPIC", "-shared", str(source), "-o", str(path)], check=True)
    return path


def load_probe(path: Path) -> Probe:
    """Loads the probe."""
    library = ctypes.CDLL(str(path))
    library.touch_rows.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
    library.touch_all.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2

    def touch_rows(table: Tensor, rows: Tensor) -> None:
        library.touch_rows(table.data_ptr(), rows.data_ptr(), rows.numel(), table.shape[1])

    def touch_all(table: Tensor, state: Tensor, grad: Tensor, rows: Tensor) -> None:
        pointers = [tensor.data_ptr() for tensor in (table, state, grad, rows)]
        library.touch_all(*pointers, rows.numel(), table.shape[1])

    return Probe(touch_rows, touch_all)


def time_of_bounds(cell: Cell, batches: Sequence[Batch], probe: Probe) -> tuple[float, float, float]:
    """Returns the seconds of the row update and of both bounds, medians of turns on the same rows and memory."""
    weight = allocate_rows((cell.num_rows, cell.dim), 0.0, torch.float32, torch.device("cpu"))
    accumulator = allocate_rows((cell.num_rows,), 0.0, torch.float32, torch.device("cpu"))
    layout = SpreadLayout(cell.num_rows)
    inputs = []
    for batch in [*batches, *(make_batch(cell, seed) for seed in range(NUM_BATCHES, 6))]:
        rows = torch.unique(layout.slot_of(batch.ids.flatten()))
        inputs.append((rows, torch.randn(rows.numel(), cell.dim) * 0.01))
    seconds: tuple[list[float], ...] = ([], [], [])
    for number in range(24):
        # Each of the three on rows that were not touched just before.
        (own, own_grad), (alone, _), (others, other_grad) = (inputs[(number + 2 * side) % 6] for side in range(3))
        marks = [time.perf_counter()]
        gradient = RowGradient.of_rows(own, own_grad, cell.num_rows)
        moment_update(weight, None, accumulator, gradient, RowStep(lr=LR), Moments(eps=EPS))
        marks.append(time.perf_counter())
        probe.rows(weight, alone)
        marks.append(time.perf_counter())
        probe.all(weight, accumulator, other_grad, others)
        marks.append(time.perf_counter())
        for taken, (start, stop) in zip(seconds, itertools.pairwise(marks), strict=True):
            taken.append(stop - start)
    update, row_bound, full_bound = map(statistics.median, seconds)
    return update, row_bound, full_bound


if __name__ == "__main__":
    main()
