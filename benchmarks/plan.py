"""The predicted and the measured time of a step of each model, on one rank and on two ranks of this machine.

python benchmarks/plan.py             # or with the names of models: word2vec retrieval ranking
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from record import Measure, append_results

from embedtrain.config.sections import Config
from embedtrain.distributed.runtime import Runtime, init_distributed, shut_down
from embedtrain.planning.measure import measure_machine
from embedtrain.planning.workload import Assumptions, workload_of
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.ranking.config import RankingConfig
from embedtrain.recipes.ranking.recipe import build_ranking
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.recipes.retrieval.recipe import build_retrieval
from embedtrain.recipes.word2vec.config import Word2VecConfig
from embedtrain.recipes.word2vec.recipe import build_word2vec
from embedtrain.sharding.machine import Machine
from embedtrain.sharding.plan import seconds_of
from embedtrain.train.step import train_step
from embedtrain.train.task import Task

SKEW = 1.0
NUM_TOKENS, NUM_WORDS = 1_500_000, 30_000
NUM_USERS, NUM_ITEMS, NUM_INTERACTIONS = 20_000, 30_000, 600_000
NUM_EXAMPLES, FIELDS, DENSE = 200_000, [f"c{i}" for i in range(20)], [f"x{i}" for i in range(8)]
FIELD_ROWS = [20, 200, 2_000, 20_000, 200_000] * 4
CELLS = {
    "word2vec": [
        ["table.dim=100", "train.words_per_step=8192"],
        ["table.dim=300", "train.words_per_step=8192"],
        ["table.dim=100", "train.words_per_step=32768"],
    ],
    "retrieval": [
        ["table.dim=64"],
        ["table.dim=128", "train.global_batch_size=1024"],
        ["table.dim=64", "retrieval.in_batch=false", "retrieval.negatives=1024"],
    ],
    "ranking": [
        ["table.dim=16", "train.global_batch_size=4096"],
        ["table.dim=16", "train.global_batch_size=1024", "ranking.architecture=dlrm"],
        ["table.dim=32", "train.global_batch_size=1024"],
    ],
}
RANKS = (1, 2)
ROUNDS, WARMUP_STEPS, STEPS = 5, 3, 9
TOLERANCE = 0.3
BUILDERS = {Word2VecConfig: build_word2vec, RetrievalConfig: build_retrieval, RankingConfig: build_ranking}


@dataclass(frozen=True)
class Cell:
    """A configuration, what trains by it, and what was found of a step of it.

    Attributes:
        name: the model and the settings.
        config: resolved.
        task: on this rank.
        predicted: seconds of a step, by round.
        measured: likewise.
    """

    name: str
    config: Config
    task: Task
    predicted: list[float]
    measured: list[float]


def main() -> int:
    """Runs the benchmark; returns 1 where a prediction is further off than tolerated."""
    if "RANK" in os.environ:
        return run_rank(sys.argv[1:] or list(CELLS))
    statuses = []
    for ranks in RANKS:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        done = subprocess.run([*command, *sys.argv], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
        statuses.append(done.returncode)
    return max(statuses)


def run_rank(models: list[str]) -> int:
    """Measures the cells of some models, on one of the ranks."""
    runtime = init_distributed(device="cpu")
    folder = ""
    if runtime.rank == 0:
        folder = tempfile.mkdtemp()
        for model in models:
            WRITERS[model](Path(folder))
    folder = runtime.ranks.broadcast_object(folder)  # the others wait: nobody works while another measures
    cells = [build_cell(model, settings, folder, runtime) for model in models for settings in CELLS[model]]
    for _ in range(ROUNDS):  # in turns, since a machine is not always as fast
        machine = measure_machine(runtime)
        if runtime.rank == 0:
            print(machine.to_json(), flush=True)
        for cell in cells:
            measure_cell(cell, machine, runtime)
    shut_down()
    if runtime.rank == 0:
        shutil.rmtree(folder)
        worst = print_table(cells, runtime)
        print(f"the worst prediction is off by {worst:.0%}: {'within' if worst <= TOLERANCE else 'NOT within'} 30 %\n")
        return int(worst > TOLERANCE)
    return 0


def build_cell(model: str, settings: list[str], folder: str, runtime: Runtime) -> Cell:
    """Builds what trains by some settings of a model. Collective: every rank."""
    base = [f"model={model}", f"data.cache_path={folder}/cache", f"run.path={folder}/run", *DATA[model](folder)]
    config = load_config(None, [*base, *settings])
    task = BUILDERS[type(config)](config, runtime).task
    return Cell(f"{model} {' '.join(setting.partition('.')[2] for setting in settings)}", config, task, [], [])


def measure_cell(cell: Cell, machine: Machine, runtime: Runtime) -> None:
    """Adds a prediction and a measurement. Collective: every rank."""
    rows = {name: shard.spec.num_rows for name, shard in cell.task.tables.shards.items()}
    if isinstance(cell.config, RankingConfig):
        rows = {}  # the configuration has them
    workload = workload_of(cell.config, Assumptions(rows_of_table=rows, exponent=SKEW))
    stages = seconds_of(workload, runtime.world_size, machine)
    cell.predicted.append(sum(stages.values()))
    cell.measured.append(measured_seconds(cell.task))
    if runtime.rank == 0:
        listed = ", ".join(f"{name} {value * 1e3:.2f}" for name, value in stages.items())
        ratio = cell.predicted[-1] / cell.measured[-1]
        print(f"  {cell.name}: {cell.measured[-1] * 1e3:.2f} ms, predicted {ratio:.2f} of it: {listed}", flush=True)


def measured_seconds(task: Task) -> float:
    """Returns the median time of a step, sampling included."""
    seconds = []
    for step in range(WARMUP_STEPS + STEPS):
        started_at = time.perf_counter()
        batch = task.batches.batch(0, step % task.batches.steps_per_epoch)
        train_step(task.model, task.optimizer, batch, task.dense)
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds[WARMUP_STEPS:])


def zipf(num_rows: int, num: int, seed: int) -> NDArray[np.int64]:
    """Returns ids that are drawn by Zipf's law."""
    shares = np.arange(1, num_rows + 1, dtype=np.float64) ** -SKEW
    return np.random.default_rng(seed).choice(num_rows, num, p=shares / shares.sum())


def write_text(folder: Path) -> None:
    """Writes lines of words."""
    lines = (" ".join(f"w{word}" for word in line) for line in np.array_split(zipf(NUM_WORDS, NUM_TOKENS, 1), 1500))
    (folder / "text.txt").write_text("\n".join(lines) + "\n")


def write_interactions(folder: Path) -> None:
    """Writes users with items."""
    users = np.random.default_rng(2).integers(0, NUM_USERS, NUM_INTERACTIONS)
    pq.write_table(pa.table({"user": users, "item": zipf(NUM_ITEMS, NUM_INTERACTIONS, 3)}), folder / "items.parquet")


def write_clicks(folder: Path) -> None:
    """Writes a click log."""
    generator = np.random.default_rng(4)
    columns = {"label": generator.integers(0, 2, NUM_EXAMPLES)}
    columns |= {
        name: zipf(rows, NUM_EXAMPLES, seed)
        for seed, (name, rows) in enumerate(zip(FIELDS, FIELD_ROWS, strict=True), 5)
    }
    columns |= {name: generator.standard_normal(NUM_EXAMPLES) for name in DENSE}
    pq.write_table(pa.table(columns), folder / "clicks.parquet")


def text_settings(folder: str) -> list[str]:
    """Returns where the text is."""
    return [f"data.path={folder}/text.txt", "data.tokenizer=whitespace"]


def interaction_settings(folder: str) -> list[str]:
    """Returns where the interactions are."""
    return [f"data.path={folder}/items.parquet"]


def click_settings(folder: str) -> list[str]:
    """Returns where the click log is, and its columns."""
    rows = ", ".join(f"{name}: {{num_rows: {rows}}}" for name, rows in zip(FIELDS, FIELD_ROWS, strict=True))
    return [
        f"data.path={folder}/clicks.parquet",
        "data.format=parquet",
        "data.encoding=id",
        f"data.categorical=[{', '.join(FIELDS)}]",
        f"data.dense=[{', '.join(DENSE)}]",
        f"data.features={{{rows}}}",
    ]


WRITERS: dict[str, Callable[[Path], None]] = {
    "word2vec": write_text,
    "retrieval": write_interactions,
    "ranking": write_clicks,
}
DATA: dict[str, Callable[[str], list[str]]] = {
    "word2vec": text_settings,
    "retrieval": interaction_settings,
    "ranking": click_settings,
}


def print_table(cells: list[Cell], runtime: Runtime) -> float:
    """Prints and keeps the medians over the rounds; returns how far the worst prediction is off."""
    print(f"\n| {runtime.world_size} ranks | predicted ms | measured ms | ratio |\n| --- | --- | --- | --- |")
    measures = []
    for cell in cells:
        predicted, measured = statistics.median(cell.predicted), statistics.median(cell.measured)
        print(f"| {cell.name} | {predicted * 1e3:.2f} | {measured * 1e3:.2f} | {predicted / measured:.2f} |")
        # The prediction stands as ours, what was measured as the peer's.
        metric = "seconds of a step, predicted against measured"
        measures.append(Measure(cell.name, metric, predicted, measured, 0.0, runtime.world_size, 1))
    measures = [replace(measure, ratio=measure.ours / measure.peer) for measure in measures]
    append_results("plan", f"torch {torch.__version__}", measures)
    return max(abs(measure.ratio - 1) for measure in measures)


if __name__ == "__main__":
    sys.exit(main())
