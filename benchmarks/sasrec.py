"""Training of SASRec beside RecBole's, which needs an environment of its own:

    python -m venv recbole && recbole/bin/pip install torch==2.13.0 recbole==1.2.1
    python benchmarks/sasrec.py EVENTS.txt --peer recbole/bin/python

EVENTS.txt has `user item item ...` lines, the newest item last. Each side is a process on one thread that prepares its
data once; then they take turns for some steps each. A step of both makes about as many predictions, each over all
items, with networks of one shape: 2 blocks of 2 heads, dimension and inner width 128, at most 50 items, dropout 0.3.
RecBole predicts only the last item of a sequence, so that its examples are all beginnings of all sequences. Beside the
predictions per second it shows the predictions per second of processor time, which other programs disturb less.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BATCH = 1536
OURS = {
    "full_softmax": ["sasrec.loss=full_softmax"],
    "sampled_softmax": ["sasrec.loss=sampled_softmax", "table.dim=64", "train.global_batch_size=768"],
}
"""What embedtrain trains, by the settings that differ from its defaults."""
PEER = "RecBole"


def main() -> None:
    """Takes turns and prints the table; as a worker, trains when told to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=Path, help="lines of `user item item ...`")
    parser.add_argument(
        "--peer", help="the Python interpreter of RecBole's environment; without it ours are timed alone"
    )
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--record", action="store_true", help="append the ratios to results.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        work(options)
        return
    pythons = dict.fromkeys(OURS, sys.executable) | ({} if options.peer is None else {PEER: options.peer})
    workers = {name: start(python, options, name) for name, python in pythons.items()}
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for _ in range(options.rounds):
        for name, worker in workers.items():
            answers[name].append(ask(worker))
    for worker in workers.values():
        worker.communicate()
    print("| side | predictions/s | per second of processor time | peak memory, MiB |\n| --- | --- | --- | --- |")
    for name, found in answers.items():
        wall, cpu = (statistics.median(rates(found, clock)) for clock in ("seconds", "cpu_seconds"))
        print(f"| {name} | {wall:,.0f} | {cpu:,.0f} | {found[-1]['peak_mib']:,.0f} |")
    if options.peer is not None:
        report_ratios(options, answers)


def rates(answers: list[dict[str, float]], clock: str) -> list[float]:
    """Returns the predictions per second of each turn."""
    return [answer["predictions"] / answer[clock] for answer in answers]


def report_ratios(options: argparse.Namespace, answers: dict[str, list[dict[str, float]]]) -> None:
    """Prints, and with `--record` writes down, how many times RecBole's speed each side has."""
    from record import Measure, append_results

    measures = []
    for name in OURS:
        ours, theirs = (statistics.median(rates(answers[each], "cpu_seconds")) for each in (name, PEER))
        print(f"{name}: {ours / theirs:.1f} times RecBole's predictions per second of processor time")
        what = f"predictions per second of processor time, {name} beside RecBole"
        measures.append(Measure(options.events.stem, what, ours, theirs, ours / theirs, ranks=1, threads=1))
    if options.record:
        append_results("sasrec", "recbole 1.2.1", measures)


def start(python: str, options: argparse.Namespace, side: str) -> subprocess.Popen[str]:
    """Starts a worker, and waits until its data are prepared and it has made its first step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [python, __file__, str(options.events), "--steps", str(options.steps), "--worker", side]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    answer_of(worker)
    return worker


def ask(worker: subprocess.Popen[str]) -> dict[str, float]:
    """Has a worker train; returns its seconds, predictions and peak memory."""
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return answer_of(worker)


def answer_of(worker: subprocess.Popen[str]) -> dict[str, float]:
    """Returns the next line of JSON that a worker prints, past what libraries print."""
    assert worker.stdout is not None
    for line in worker.stdout:
        if line.startswith("{"):
            found: dict[str, float] = json.loads(line)
            return found
    raise SystemExit("a worker ended")


def work(options: argparse.Namespace) -> None:
    """Trains for some steps for each line of standard input."""
    with tempfile.TemporaryDirectory() as folder:
        steps = recbole_steps(options, Path(folder)) if options.worker == PEER else our_steps(options, folder)
        next(steps)
        print("{}", flush=True)
        for _ in sys.stdin:
            before = time.perf_counter(), time.process_time()
            predictions = sum(next(steps) for _ in range(options.steps))
            seconds, cpu_seconds = time.perf_counter() - before[0], time.process_time() - before[1]
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "predictions": predictions, "peak_mib": peak}
            print(json.dumps(answer), flush=True)


def our_steps(options: argparse.Namespace, folder: str) -> Iterator[int]:
    """Trains for a step and yields its predictions, again and again."""
    import torch

    from embedtrain.distributed.ranks import ONE_PROCESS
    from embedtrain.distributed.runtime import Runtime
    from embedtrain.recipes.building import build_parts
    from embedtrain.recipes.loading import load_config
    from embedtrain.train.step import train_step

    settings = [f"data.path={options.events}", f"data.cache_path={folder}", f"run.path={folder}/run", "run.device=cpu"]
    config = load_config(None, ["model=sasrec", *settings, *OURS[options.worker]])
    task = build_parts(config, Runtime(ONE_PROCESS, 0, torch.device("cpu"))).task
    batches: Any = task.batches
    for epoch in range(1 << 20):
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(epoch, step)
            train_step(task.model, task.optimizer, batch, task.dense)
            yield batch.num_examples


def recbole_steps(options: argparse.Namespace, folder: Path) -> Iterator[int]:
    """Trains as RecBole's `Trainer` does for a step and yields its predictions, again and again."""
    import numpy as np
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, init_seed

    for old, new in (("float_", np.float64), ("complex_", np.complex128), ("unicode_", np.str_)):
        setattr(np, old, new)  # RecBole uses names that NumPy 2 no longer has
    (folder / "data").mkdir()
    with options.events.open() as lines, (folder / "data" / "data.inter").open("w") as target:
        target.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for line in lines:
            user, *items = line.split()
            target.writelines(f"{user}\t{item}\t{time}\n" for time, item in enumerate(items))
    config = Config(
        model="SASRec",
        dataset="data",
        config_dict={
            "data_path": str(folder),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "hidden_size": 128,
            "inner_size": 128,
            "hidden_dropout_prob": 0.3,
            "attn_dropout_prob": 0.3,
            "MAX_ITEM_LIST_LENGTH": 50,
            "loss_type": "CE",
            "train_neg_sample_args": None,
            "train_batch_size": BATCH,
            "use_gpu": False,
            "show_progress": False,
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        },
    )
    init_seed(1, True)
    train_data, _, _ = data_preparation(config, create_dataset(config))
    model = get_model("SASRec")(config, train_data.dataset)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    while True:
        for interaction in train_data:
            optimizer.zero_grad()
            loss = model.calculate_loss(interaction)
            loss.item()  # its trainer adds the losses up
            loss.backward()
            optimizer.step()
            yield len(interaction)


if __name__ == "__main__":
    main()
