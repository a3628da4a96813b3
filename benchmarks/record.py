"""The record of all benchmarks: a CSV file with a row per measure."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS_PATH = ROOT / "benchmarks" / "results.csv"
COLUMNS = [
    "benchmark",
    "corpus",
    "commit",
    "date",
    "cpu",
    "ranks",
    "threads",
    "versions",
    "metric",
    "ours",
    "peer",
    "ratio",
]


@dataclass(frozen=True)
class Measure:
    """One comparison.

    Attributes:
        corpus: what was worked on: a text, or a cell of a grid.
        metric: what was measured, with the peer's name where there are several.
        ours: our value.
        peer: the peer's.
        ratio: by how much ours is better.
        ranks: of the run.
        threads: of each rank.
    """

    corpus: str
    metric: str
    ours: float
    peer: float
    ratio: float
    ranks: int
    threads: int


def append_results(benchmark: str, versions: str, measures: Sequence[Measure]) -> None:
    """Appends a row per measure."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    is_new = not RESULTS_PATH.exists()
    with RESULTS_PATH.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for measure in measures:
            writer.writerow(
                [
                    benchmark,
                    measure.corpus,
                    commit,
                    datetime.date.today().isoformat(),
                    cpu_name(),
                    measure.ranks,
                    measure.threads,
                    versions,
                    measure.metric,
                    f"{measure.ours:.4f}",
                    f"{measure.peer:.4f}",
                    f"{measure.ratio:.3f}",
                ]
            )


def cpu_name() -> str:
    """Returns the processor's name and the number of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor()
    return f"{name}, {os.cpu_count()} cores"
