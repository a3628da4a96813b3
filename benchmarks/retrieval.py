"""Retrieval beside RecBole's BPR: interactions per second and peak memory on one thread, in turns.

    python -m venv recbole && recbole/bin/pip install torch==2.13.0 recbole==1.2.1
    python benchmarks/retrieval.py TRAIN.txt --peer recbole/bin/python

TRAIN.txt has `user item item ...` lines. RecBole needs an environment of its own, hence its interpreter as an option;
without it embedtrain is timed alone. Each side is a process that prepares its data once; then they take turns for some
steps each. A step of both has the same number of interactions. RecBole compares each with one sampled item, embedtrain
with all items of the step. RecBole's Adam updates whole tables; that is what its model comes with.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DIM = 64
WARM_UP_STEPS = 20
SIDES = {"default": [], "BPR": ["retrieval.loss=bpr"]}
"""What embedtrain trains, by the settings that differ from its defaults."""


def main() -> None:
    """Takes turns and prints the table; as a worker, trains when told to."""
    parser = argparse.ArgumentParser(description="Retrieval beside RecBole's BPR.")
    parser.add_argument("train", type=Path, help="file of `user item item ...` lines")
    parser.add_argument("--peer", help="an interpreter that has RecBole")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of each side in a round")
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Prints interactions per second and peak memory of each side."""
    workers = {f"embedtrain, {name}": Worker(sys.executable, options, name) for name in SIDES}
    batch = round(workers["embedtrain, default"].ready["interactions_per_step"])
    if options.peer is not None:
        workers["RecBole, BPR"] = Worker(options.peer, options, "recbole", batch)
    rates: dict[str, list[float]] = {name: [] for name in workers}
    memory: dict[str, float] = {}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            answer = worker.train()
            rates[name].append(answer["interactions"] / answer["seconds"])
            memory[name] = answer["peak_mib"]
    for worker in workers.values():
        worker.stop()
    print(f"{options.train}, dim {DIM}, {batch} interactions per step, one thread, {options.rounds} turns\n")
    print("| side | interactions per second (lowest to highest) | peak memory, MiB |\n| --- | --- | --- |")
    for name, found in rates.items():
        spread = f"{min(found):,.0f} to {max(found):,.0f}"
        print(f"| {name} | {statistics.median(found):,.0f} ({spread}) | {memory[name]:,.0f} |")
    if options.peer is not None:
        report_ratios(options, rates, memory)


def report_ratios(options: argparse.Namespace, rates: dict[str, list[float]], memory: dict[str, float]) -> None:
    """Prints, and with `--record` writes down, how many times RecBole's speed each side has."""
    from record import Measure, append_results

    peer = "RecBole, BPR"
    measures = []
    for name in rates:
        if name == peer:
            continue
        ratios = [ours / theirs for ours, theirs in zip(rates[name], rates[peer], strict=True)]
        print(f"{name}: {statistics.median(ratios):.2f} times RecBole's interactions per second (median of the turns)")
        speeds = statistics.median(rates[name]), statistics.median(rates[peer])
        corpus = f"{options.train.parent.name}, {name}"
        measures.append(Measure(corpus, "interactions/s, RecBole BPR", *speeds, statistics.median(ratios), 1, 1))
        measures.append(
            Measure(corpus, "peak MiB, RecBole BPR", memory[name], memory[peer], memory[peer] / memory[name], 1, 1)
        )
    if options.record:
        import torch

        append_results("retrieval", f"torch {torch.__version__}, recbole 1.2.1", measures)


class Worker:
    """A process that trains for some steps whenever it is told to."""

    def __init__(self, python: str, options: argparse.Namespace, side: str, batch: int | None = None) -> None:
        command = [python, __file__, str(options.train), "--steps", str(options.steps), "--worker", side]
        command += [] if batch is None else ["--batch", str(batch)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ready = self._answer()

    def train(self) -> dict[str, float]:
        """Has it train; returns its seconds, interactions and peak memory."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, float]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, float] = json.loads(line)
                return answer
        raise SystemExit(f"a side failed: {self._process.args}")


def work(options: argparse.Namespace) -> None:
    """Prepares a side, and trains for some steps at each line of the standard input."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.worker == "recbole":
            steps, size = recbole_steps(options, Path(folder)), float(options.batch)
        else:
            steps, size = embedtrain_steps(options, folder)
        for _ in range(WARM_UP_STEPS):
            next(steps)
        print(json.dumps({"interactions_per_step": size}), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            interactions = sum(next(steps) for _ in range(options.steps))
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"seconds": seconds, "interactions": interactions, "peak_mib": peak}), flush=True)


def embedtrain_steps(options: argparse.Namespace, folder: str) -> tuple[Iterator[int], float]:
    """Returns an iterator that trains for a step and yields its interactions, and their mean number."""
    import torch

    from embedtrain.distributed.ranks import ONE_PROCESS
    from embedtrain.distributed.runtime import Runtime
    from embedtrain.recipes.building import build_parts
    from embedtrain.recipes.loading import load_config
    from embedtrain.train.step import train_step

    settings = [f"data.path={options.train}", f"data.cache_path={folder}", f"run.path={folder}/run", f"table.dim={DIM}"]
    config = load_config(None, ["model=retrieval", "run.device=cpu", *settings, *SIDES[options.worker]])
    task = build_parts(config, Runtime(ONE_PROCESS, 0, torch.device("cpu"))).task
    batches: Any = task.batches

    def steps() -> Iterator[int]:
        epoch = 0
        while True:
            for step in range(batches.steps_per_epoch):
                batch = batches.batch(epoch, step)
                train_step(task.model, task.optimizer, batch, task.dense)
                yield batch.num_examples
            epoch += 1

    return steps(), batches.examples_per_epoch / batches.steps_per_epoch


def recbole_steps(options: argparse.Namespace, folder: Path) -> Iterator[int]:
    """Returns an iterator that trains RecBole's BPR for a step and yields its interactions."""
    import numpy as np

    for name, value in {"float_": np.float64, "complex_": np.complex128, "unicode_": np.str_}.items():
        setattr(np, name, value)  # RecBole 1.2.1 asks for names that NumPy 2 no longer has
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, init_seed

    write_interactions(options.train, folder)
    config = Config(
        model="BPR",
        dataset="data",
        config_dict={
            "data_path": str(folder),
            "load_col": {"inter": ["user_id", "item_id"]},
            "embedding_size": DIM,
            "train_batch_size": options.batch,
            "use_gpu": False,
            "show_progress": False,
            "eval_args": {"split": {"RS": [0.98, 0.01, 0.01]}, "order": "RO", "group_by": "user", "mode": "full"},
        },
    )
    init_seed(1, True)
    dataset = create_dataset(config)
    train_data, _, _ = data_preparation(config, dataset)
    model = get_model("BPR")(config, train_data.dataset)
    return recbole_training(model, train_data)


def recbole_training(model: Any, train_data: Any) -> Iterator[int]:
    """Trains as RecBole's `Trainer` does, and yields the interactions of each step."""
    import torch

    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    length: Callable[[Any], int] = len
    while True:
        for interaction in train_data:
            optimizer.zero_grad()
            loss = model.calculate_loss(interaction)
            loss.item()  # its trainer adds the losses up
            loss.backward()
            optimizer.step()
            yield length(interaction)


def write_interactions(path: Path, folder: Path) -> None:
    """Writes lines of `user item item ...` as RecBole's interaction file."""
    (folder / "data").mkdir()
    with path.open() as lines, (folder / "data" / "data.inter").open("w") as target:
        target.write("user_id:token\titem_id:token\n")
        for line in lines:
            user, *items = line.split()
            target.writelines(f"{user}\t{item}\n" for item in items)


if __name__ == "__main__":
    main()
