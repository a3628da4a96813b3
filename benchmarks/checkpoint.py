"""Checkpoints beside the plainest way to move the same bytes, and beside torch's own distributed checkpoint.

    python benchmarks/checkpoint.py --path /mnt/disk/benchmark

With 1 rank and with 2, 4 GB of weights and optimizer state: each repeat takes its turn with each way, every process
writing and fsyncing, or reading, its part of the same bytes; before each load the page cache is emptied of all files.
The ways are plain writes and reads, `save_checkpoint` and `load_shards`, and (in the first repeat alone)
`torch.distributed.checkpoint` with its file writer. Then a training of Zipf(1.05) traffic saves in the background: how
long the longest step and the call of `save` take beside the median step, how much memory that takes, and how many bytes
a delta has beside a full save. The ratios are taken within a repeat, for disks of virtual machines vary from minute to
minute. Each way begins when as many bytes were just dropped from the page cache: memory that a virtual machine has to
get from its host first comes at a fifth of the speed of memory that it reuses.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

import embedtrain as et
from embedtrain.checkpoint import CheckpointReader, CheckpointSaver, SaveOptions, load_shards, save_checkpoint
from embedtrain.checkpoint.header import row_blocks
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import job_ranks

DIM = 64
ROW_BYTES = 4 * (DIM + 1)
ZIPF_EXPONENT = 1.05


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        num_bytes: of weights and optimizer state over all ranks.
        repeats: how often each way takes its turn.
        steps: steps between two saves of the training.
        ids_per_step: ids that each rank looks up a step.
        path: folder that is written to.
    """

    num_bytes: int
    repeats: int
    steps: int
    ids_per_step: int
    path: str


class Bench:
    """One rank of a measurement."""

    def __init__(self, settings: Settings, ranks: Ranks) -> None:
        self.settings = settings
        self.ranks = ranks
        self.rank = ranks.rank
        self.num_rows = settings.num_bytes // ROW_BYTES
        self.tables = et.EmbeddingCollection([et.TableSpec("item", self.num_rows, DIM)], ranks=ranks)
        self.optimizer = et.optim.RowwiseAdagrad(self.tables, lr=0.01)
        self.views = self.tables.shard_views()
        self.generator = torch.Generator().manual_seed(self.rank)

    def seconds(self, action: Callable[[], object]) -> float:
        """Returns how long the slowest rank takes, all starting together."""
        self.ranks.all_gather(None)
        start = time.perf_counter()
        action()
        return max(self.ranks.all_gather(time.perf_counter() - start))

    def measure_files(self) -> dict[str, list[float]]:
        """Returns the seconds of each way to write and to read, a value a repeat."""
        found: dict[str, list[float]] = {}
        folder = Path(self.settings.path) / "warm-up"
        folder.mkdir(parents=True, exist_ok=True)
        self.seconds(lambda: self.write_plainly(folder))
        for repeat in range(self.settings.repeats):
            last, folder = folder, Path(self.settings.path) / f"repeat-{repeat}"
            folder.mkdir(parents=True, exist_ok=True)
            ways: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
                "plain": (lambda f=folder: self.write_plainly(f), lambda f=folder: self.read_plainly(f)),
                "embedtrain": (lambda f=folder: self.save(f), lambda f=folder: self.load(f)),
                "dcp": (lambda f=folder: self.save_by_dcp(f), lambda f=folder: self.load_by_dcp(f)),
            }
            order = [name for name in ways if name != "dcp" or repeat == 0]
            if repeat % 2:
                order.reverse()
            for kind, index in (("save", 0), ("load", 1)):
                for name in order:
                    self.drop_from_page_cache(last)
                    if self.rank == 0 and last != folder:
                        shutil.rmtree(last)
                    found.setdefault(f"{kind} {name}", []).append(self.seconds(ways[name][index]))
                    last = folder
        self.ranks.all_gather(None)
        if self.rank == 0:
            shutil.rmtree(self.settings.path)
        return found

    def write_plainly(self, folder: Path) -> None:
        """Writes the bytes of the shards and makes them durable."""
        with open(folder / f"plain-{self.rank}", "wb", buffering=0) as file:
            for view in self.views:
                for block in row_blocks(view.tensor):
                    file.write(block.numpy().data)
            os.fsync(file.fileno())

    def read_plainly(self, folder: Path) -> None:
        """Reads them back in place."""
        with open(folder / f"plain-{self.rank}", "rb", buffering=0) as file:
            for view in self.views:
                for block in row_blocks(view.tensor):
                    file.readinto(block.numpy().data)

    def save(self, folder: Path) -> None:
        """Saves as embedtrain does."""
        save_checkpoint(str(folder), 1, self.views, {}, self.ranks)

    def load(self, folder: Path) -> None:
        """Loads as embedtrain does."""
        with CheckpointReader(str(folder / "step-000000001")) as reader:
            load_shards(reader, self.views)

    def save_by_dcp(self, folder: Path) -> None:
        """Saves by torch's file writer."""
        dcp.save(
            self.tables.state_dict(),
            storage_writer=dcp.FileSystemWriter(str(folder / "dcp")),
            no_dist=self.ranks.size == 1,
        )

    def load_by_dcp(self, folder: Path) -> None:
        """Loads by torch's file reader."""
        reader = dcp.FileSystemReader(str(folder / "dcp"))
        dcp.load(self.tables.state_dict(), storage_reader=reader, no_dist=self.ranks.size == 1)

    def drop_from_page_cache(self, folder: Path) -> None:
        """Has the next reads come from the disk."""
        if self.rank == 0:
            for path in filter(Path.is_file, folder.rglob("*")):
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def train_once(self) -> float:
        """Trains a step of Zipf traffic; returns its seconds."""
        uniform = torch.rand(self.settings.ids_per_step, generator=self.generator, dtype=torch.float64)
        power = 1 - ZIPF_EXPONENT
        ids = ((1 + uniform * (self.num_rows**power - 1)) ** (1 / power)).long() - 1
        start = time.perf_counter()
        vectors = self.tables({"item": et.Jagged.from_ids(ids.clamp(0, self.num_rows - 1))})
        vectors["item"].sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start

    def measure_training(self) -> dict[str, float]:
        """Returns what saving in the background costs, and how large a delta is."""
        folder = Path(self.settings.path) / "training"
        saver = CheckpointSaver(str(folder), self.ranks, self.ranks.for_thread(600.0), SaveOptions(full_every=2))
        quiet = [self.train_once() for _ in range(self.settings.steps)][5:]
        found = {"median step, no save": statistics.median(quiet), "longest step, no save": max(quiet)}
        sizes: list[int] = []
        for number, kind in enumerate(("full", "delta")):
            before = peak = resident_bytes()
            start = time.perf_counter()
            saver.save(number, self.views, {})
            found[f"call of save, {kind}"] = time.perf_counter() - start
            steps = []
            # Steps are collective: the ranks go on until the last one has written its part.
            while any(self.ranks.all_gather(not saver.is_idle)):
                steps.append(self.train_once())
                peak = max(peak, resident_bytes())
            found[f"until durable, {kind}"] = time.perf_counter() - start
            found[f"steps meanwhile, {kind}"] = len(steps)
            found[f"median step meanwhile, {kind}"] = statistics.median(steps) if steps else 0.0
            found[f"longest step meanwhile, {kind}"] = max(steps, default=0.0)
            found[f"extra memory, {kind}"] = peak - before
            saver.settle()
            sizes.append(sum(path.stat().st_size for path in (folder / f"step-{number:09d}").iterdir()))
            if kind == "full":
                for _ in range(self.settings.steps - len(steps)):
                    self.train_once()
                found["steps before the delta"] = max(len(steps), self.settings.steps)
        found["bytes, delta / full"] = sizes[1] / sizes[0]
        self.ranks.all_gather(None)
        found["copy of all rows to a reused buffer"] = self.copy_seconds()
        if self.rank == 0:
            shutil.rmtree(folder)
        return found

    def copy_seconds(self) -> float:
        """Returns how long training would stop if all rows were copied before it went on."""
        buffers = [torch.zeros_like(view.tensor) for view in self.views]

        def copy() -> None:
            for buffer, view in zip(buffers, self.views, strict=True):
                buffer.copy_(view.tensor)

        return self.seconds(copy)


def resident_bytes() -> int:
    """Returns the memory of this process, without the page cache."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run_rank(rank: int, world_size: int, store_path: str, results_path: str, settings: Settings) -> None:
    """Measures as one of the ranks; rank 0 keeps what all found."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    if world_size > 1:
        store = dist.FileStore(store_path, world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=10))
    ranks = job_ranks()
    bench = Bench(settings, ranks)
    files = bench.measure_files()
    training = ranks.all_gather(bench.measure_training())
    if rank == 0:
        slowest = {name: max(found[name] for found in training) for name in training[0]}
        Path(results_path).write_text(json.dumps({"files": files, "training": slowest}))
    if world_size > 1:
        dist.destroy_process_group()


def print_table(num_bytes: int, results: dict[int, dict[str, Any]]) -> None:
    """Prints what was measured, a column for each number of ranks."""
    rows: dict[str, list[str]] = {}
    for found in results.values():
        for name, seconds in sorted(found["files"].items(), reverse=True):
            rates = sorted(num_bytes / each / 1e9 for each in seconds)
            plain = found["files"][f"{name.split()[0]} plain"]
            ratio = statistics.median(a / b for a, b in zip(plain, seconds, strict=False))
            cell = f"{statistics.median(rates):.2f} ({rates[0]:.2f} to {rates[-1]:.2f})"
            rows.setdefault(f"{name}, GB/s", []).append(cell)
            if not name.endswith("plain"):
                rows.setdefault(f"{name} / plain, median ratio", []).append(f"{ratio:.2f}")
        for name, value in found["training"].items():
            if "memory" in name:
                rows.setdefault(f"{name}, MB", []).append(f"{value / 1e6:,.0f}")
            elif name.startswith(("bytes", "steps")):
                rows.setdefault(name, []).append(f"{value:,.4g}")
            else:
                rows.setdefault(f"{name}, ms", []).append(f"{1e3 * value:,.2f}")
    print(f"\n{num_bytes / 1e9:.2f} GB; torch {torch.__version__}, {os.cpu_count()} CPUs, one disk\n")
    print(f"| {'':<40} | " + " | ".join(f"{f'ranks: {size}':<22}" for size in results) + " |")
    print(f"| {'-' * 40} | " + " | ".join("-" * 22 for _ in results) + " |")
    for name, cells in rows.items():
        print(f"| {name:<40} | " + " | ".join(f"{cell:<22}" for cell in cells) + " |")


def main() -> None:
    """Measures with each number of ranks in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of state over all ranks (4)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="steps between two saves of the training (200)")
    parser.add_argument("--ids", type=int, default=4096, help="ids that each rank looks up a step (4096)")
    parser.add_argument("--path", help="folder on the disk to measure; a temporary one")
    options = parser.parse_args()
    num_bytes = int(options.gigabytes * 1e9)
    results = {}
    for world_size in options.ranks:
        with tempfile.TemporaryDirectory(dir=options.path) as folder:
            settings = Settings(num_bytes, options.repeats, options.steps, options.ids, str(Path(folder) / "files"))
            results_path = Path(folder) / "results.json"
            arguments = (world_size, str(Path(folder) / "store"), str(results_path), settings)
            mp.start_processes(run_rank, arguments, nprocs=world_size, start_method="spawn")
            results[world_size] = json.loads(results_path.read_text())
    print_table(num_bytes, results)


if __name__ == "__main__":
    main()
