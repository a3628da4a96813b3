"""A click log whose true model is known: how near training comes to the best that any model could do.

    python benchmarks/planted_clicks.py                      # 10 million rows, 8 million examples, 2 ranks

The ids of each feature are Zipf-distributed over its table. A click is drawn with the probability of a planted model:
a weight for each row, dot products of small vectors of pairs of features, and dense features. Its own area under the
curve on held-out examples is the most that any model can reach. The log is written as Parquet to a temporary folder,
trained on through the command line under torchrun, and deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from numpy.typing import NDArray

from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.metrics.classification import ClassificationMeter, ClassificationReport

ROOT = Path(__file__).resolve().parents[1]
SHARES = (0.5, 0.25, 0.12, 0.08, 0.04, 0.006, 0.003, 0.0009, 0.0001)
"""The features' shares of all rows."""
NUM_DENSE, PLANTED_DIM, NUM_PAIRED = 4, 3, 3
"""The last features, of the smallest tables, also act in pairs."""
BLOCK = 1 << 18
FIELDS = [f"f{i}" for i in range(len(SHARES))]
DENSE = [f"x{i}" for i in range(NUM_DENSE)]


@dataclass(frozen=True)
class Planted:
    """The true model.

    Attributes:
        weights: per feature, [num_rows].
        vectors: of the last features, [num_rows, 3].
        cumulative: per feature, the distribution function of the ids.
        dense: [4].
    """

    weights: list[NDArray[np.float32]]
    vectors: list[NDArray[np.float32]]
    cumulative: list[NDArray[np.float64]]
    dense: NDArray[np.float32]

    def logits(self, ids: list[NDArray[np.int64]], dense: NDArray[np.float32]) -> NDArray[np.float64]:
        """Returns the true log odds of examples, [n]."""
        total = -1.5 + dense @ self.dense + sum(w[i] for w, i in zip(self.weights, ids, strict=True))
        paired = [v[i] for v, i in zip(self.vectors, ids[-NUM_PAIRED:], strict=True)]
        for first in range(NUM_PAIRED):
            for second in range(first):
                total = total + (paired[first] * paired[second]).sum(axis=1)
        return np.asarray(total, np.float64)


def main() -> int:
    """Generates, trains and prints the table; returns 1 where the difference is larger than tolerated."""
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="planted-clicks-", dir=options.work) as folder:
        path = Path(folder)
        planted = plant(options.rows, options.zipf, options.seed)
        start = time.perf_counter()
        write_log(planted, path / "train", options.examples, options.seed + 1)
        best = write_log(planted, path / "valid", max(options.examples // 10, 20_000), options.seed + 2)
        generated = time.perf_counter()
        ours = train(planted, path, options)
        seconds = {"generate": generated - start, "train": time.perf_counter() - generated}
    rows = sum(map(len, planted.weights))
    print(f"\n{rows:,} rows, {options.examples:,} examples, {options.ranks} ranks; seconds: {seconds}\n")
    print("| measure | planted model | embedtrain | difference |")
    print("| --- | --- | --- | --- |")
    for name, value in best.as_record().items():
        print(f"| {name} | {value:.4f} | {ours[f'valid_{name}']:.4f} | {ours[f'valid_{name}'] - value:+.4f} |")
    print(f"{ours['examples_per_second']:,.0f} examples per second, the median of the records")
    return int(best.auc - ours["valid_auc"] > options.tolerance)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="A click log with a planted model.")
    parser.add_argument("overrides", nargs="*", help="key=value settings for embedtrain")
    parser.add_argument("--examples", type=int, default=8_000_000)
    parser.add_argument("--rows", type=int, default=10_000_000, help="of all tables together")
    parser.add_argument("--zipf", type=float, default=1.5, help="exponent of the ids' distribution")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--work", type=Path, help="where to make the temporary folder")
    return parser.parse_args()


def plant(num_rows: int, exponent: float, seed: int) -> Planted:
    """Returns a true model over tables of so many rows together."""
    generator = np.random.default_rng(seed)
    sizes = [max(10, round(num_rows * share)) for share in SHARES]
    # Rows of the large tables, most of them too rare to be learnt by anyone, matter less.
    scales = np.linspace(0.15, 0.6, len(sizes))
    cumulative = []
    for size in sizes:
        odds = np.arange(1, size + 1) ** -exponent
        cumulative.append(odds.cumsum() / odds.sum())
    return Planted(
        weights=[(generator.standard_normal(n) * s).astype(np.float32) for n, s in zip(sizes, scales, strict=True)],
        vectors=[(generator.standard_normal((n, PLANTED_DIM)) * 0.4).astype(np.float32) for n in sizes[-NUM_PAIRED:]],
        cumulative=cumulative,
        dense=np.array([0.8, -0.5, 0.3, 0.0], np.float32),
    )


def write_log(planted: Planted, path: Path, num_examples: int, seed: int) -> ClassificationReport:
    """Writes examples as Parquet and returns how well the planted model itself predicts them."""
    generator = np.random.default_rng(seed)
    meter = ClassificationMeter()
    path.mkdir()
    for number, start in enumerate(range(0, num_examples, BLOCK)):
        n = min(BLOCK, num_examples - start)
        ids = [np.searchsorted(c, generator.random(n), side="right").clip(max=len(c) - 1) for c in planted.cumulative]
        dense = generator.standard_normal((n, NUM_DENSE)).astype(np.float32)
        logits = planted.logits(ids, dense)
        labels = generator.random(n) < 1 / (1 + np.exp(-logits))
        meter.add(torch.from_numpy(logits), torch.from_numpy(labels.astype(np.float32)))
        columns = {"label": labels.astype(np.int8), **dict(zip(DENSE, dense.T, strict=True))}
        columns |= dict(zip(FIELDS, ids, strict=True))
        pq.write_table(pa.table(columns), path / f"part-{number:03d}.parquet", row_group_size=1 << 16)
    return meter.report(ONE_PROCESS)


def train(planted: Planted, path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Trains through the command line; returns the last measures on held-out examples, and the examples per second."""
    config = {
        "model": "ranking",
        "data": {
            "path": str(path / "train"),
            "valid_path": str(path / "valid"),
            "format": "parquet",
            "dense": DENSE,
            "dense_transform": "none",
            "categorical": FIELDS,
            "encoding": "id",
            "features": {
                name: {"num_rows": len(weights)} for name, weights in zip(FIELDS, planted.weights, strict=True)
            },
            "cache_path": str(path / "cache"),
        },
        "table": {"dim": 8},
        "train": {"global_batch_size": 4096},
        # A first value keeps rows that are seen a few times, most of them all, from moving by what is noise.
        "optimizer": {"lr": 0.2, "initial_accumulator_value": 1e-6},
        "dense_optimizer": {"lr": 0.005},
        "checkpoint": {"mode": "sync"},
        "log": {"tensorboard": False},
        "run": {"path": str(path / "run")},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.ranks}"]
    subprocess.run(
        [
            sys.executable,
            *(launcher if options.ranks > 1 else []),
            "-m",
            "embedtrain",
            "train",
            str(path / "config.yaml"),
            *options.overrides,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    records = [json.loads(line) for line in (path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [record["examples_per_second"] for record in records if "examples_per_second" in record]
    measured = next(record for record in reversed(records) if "valid_auc" in record)
    return {**measured, "examples_per_second": statistics.median(rates)}


if __name__ == "__main__":
    sys.exit(main())
