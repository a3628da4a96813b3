"""The predicted and the measured time of a step of word2vec, on two ranks of this machine, in one run."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import launch
import numpy as np
import torch
from record import Measure, append_results

from embedtrain.build.word2vec import build_word2vec
from embedtrain.config import load_config
from embedtrain.config.word2vec import Word2VecConfig
from embedtrain.distributed.collectives import broadcast_object
from embedtrain.distributed.runtime import Runtime, init_distributed, shut_down
from embedtrain.planning.measure import measure_machine
from embedtrain.planning.workload import Assumptions, workload_of
from embedtrain.sharding.plan import seconds_of
from embedtrain.train.step import train_step
from embedtrain.train.task import Task

NUM_TOKENS, NUM_WORDS, SKEW = 1_500_000, 30_000, 1.0
CELLS = [(100, 8192), (300, 8192), (100, 32768)]  # dim, words a step
ROUNDS, WARMUP_STEPS, STEPS = 3, 4, 16
TOLERANCE = 0.3


def main() -> int:
    """Runs the benchmark."""
    if not launch.is_rank():
        return launch.run_ranks()
    runtime = init_distributed(device="cpu")
    folder = ""
    if runtime.rank == 0:
        folder = tempfile.mkdtemp()
        write_text(Path(folder) / "text.txt")
    folder = broadcast_object(folder, runtime.group)  # the others wait: nobody works while another measures
    configs = {cell: settings(folder, *cell) for cell in CELLS}
    tasks = {cell: build_word2vec(config, runtime).task for cell, config in configs.items()}
    predicted: dict[tuple[int, int], list[float]] = {cell: [] for cell in CELLS}
    measured: dict[tuple[int, int], list[float]] = {cell: [] for cell in CELLS}
    for _ in range(ROUNDS):  # in turns, since a machine is not always as fast
        machine = measure_machine(runtime)
        for cell, config in configs.items():
            num_rows = tasks[cell].tables.row_groups[0].shards[0].spec.num_rows
            workload = workload_of(config, Assumptions(rows_of_others=num_rows, exponent=SKEW))
            stages = seconds_of(workload, runtime.world_size, machine)
            predicted[cell].append(sum(stages.values()))
            measured[cell].append(measured_seconds(tasks[cell]))
            if runtime.rank == 0:
                listed = ", ".join(f"{name} {value * 1e3:.2f}" for name, value in stages.items())
                ratio = predicted[cell][-1] / measured[cell][-1]
                print(f"  {cell}: {measured[cell][-1] * 1e3:.2f} ms, predicted {ratio:.2f} of it: {listed}", flush=True)
    rows = [(*cell, statistics.median(predicted[cell]), statistics.median(measured[cell])) for cell in CELLS]
    if runtime.rank == 0:
        for dim, words_per_step, by_plan, by_clock in rows:
            print(
                f"dim {dim}, {words_per_step:,} words a step: predicted {by_plan * 1e3:.2f} ms, "
                f"measured {by_clock * 1e3:.2f} ms, ratio {by_plan / by_clock:.2f}"
            )
    shut_down()
    if runtime.rank == 0:
        shutil.rmtree(folder)
        record(rows, runtime)
        worst = max(abs(by_plan / by_clock - 1) for _, _, by_plan, by_clock in rows)
        print(f"the worst prediction is off by {worst:.0%}: {'within' if worst <= TOLERANCE else 'NOT within'} 30 %")
    return 0


def settings(folder: str, dim: int, words_per_step: int) -> Word2VecConfig:
    """Returns the configuration of a cell."""
    config = load_config(
        None,
        [
            f"data.path={folder}/text.txt",
            f"data.cache_path={folder}/cache",
            "data.tokenizer=whitespace",
            f"run.path={folder}/run",
            f"table.dim={dim}",
            f"train.words_per_step={words_per_step}",
        ],
    )
    assert isinstance(config, Word2VecConfig)
    return config


def write_text(path: Path) -> None:
    """Writes lines of words that are drawn by Zipf's law."""
    shares = np.arange(1, NUM_WORDS + 1, dtype=np.float64) ** -SKEW
    drawn = np.random.default_rng(1).choice(NUM_WORDS, NUM_TOKENS, p=shares / shares.sum())
    lines = (" ".join(f"w{word}" for word in line) for line in np.array_split(drawn, NUM_TOKENS // 1000))
    path.write_text("\n".join(lines) + "\n")


def measured_seconds(task: Task) -> float:
    """Returns the median time of a step, sampling included."""
    seconds = []
    for step in range(WARMUP_STEPS + STEPS):
        started_at = time.perf_counter()
        batch = task.batches.batch(0, step % task.batches.steps_per_epoch)
        train_step(task.model, task.optimizer, batch)
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds[WARMUP_STEPS:])


def record(rows: list[tuple[int, int, float, float]], runtime: Runtime) -> None:
    """Keeps the figures: the prediction as ours, what was measured as the peer's."""
    measures = [
        Measure(
            f"dim {dim}, {words_per_step} words a step",
            "seconds of a step, predicted against measured",
            predicted,
            measured,
            predicted / measured,
            runtime.world_size,
            torch.get_num_threads(),
        )
        for dim, words_per_step, predicted, measured in rows
    ]
    append_results("plan", f"torch {torch.__version__}", measures)


if __name__ == "__main__":
    sys.exit(main())
