"""Word vectors on several ranks: words per second, bytes between ranks, and milliseconds of each stage of a step.

    python benchmarks/scaling.py ../shared/data/text-en-wiki/wiki_a.txt --ranks 1 2

Trains steps of full size by the default settings, one thread per rank. "strong": the ranks share a step. "weak": steps
grow with the number of ranks. "separate": independent runs of one rank each, at the same time, which shows what the
cores can do together. The kinds take turns. The figures are medians; the first turn does not count. Runs
with more ranks than cores are marked. A stage may lie inside another. "exchange" is the time to wait for other ranks
and to copy their rows, anywhere in a step.
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
from pathlib import Path
from typing import Any

import torch
from record import Measure, append_results

import embedtrain as et
from embedtrain.data.skipgram import TextBatch
from embedtrain.distributed.runtime import init_distributed
from embedtrain.distributed.stages import stage
from embedtrain.ops.sort_unique import sort_unique
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.word2vec import recipe
from embedtrain.recipes.word2vec.model import INPUT, OUTPUT, Word2Vec
from embedtrain.train.profile import StepProfile
from embedtrain.train.step import train_step

WARMUP_STEPS = 5
STAGES = ["sample", "unique", "exchange", "kernel", "update"]
KINDS = ("strong", "weak", "separate")
Result = dict[str, Any]
_ID_BYTES, _COUNT_BYTES, _VALUE_BYTES = 4, 4, 4


def main() -> None:
    """Runs every size in turn and prints the table; as a rank, trains."""
    options = parse_options()
    if options.as_rank:
        run_rank(options)
        return
    sizes = [(ranks, kind) for ranks in options.ranks for kind in KINDS if ranks > 1 or kind == "strong"]
    found: dict[tuple[int, str], list[Result]] = {size: [] for size in sizes}
    for turn in range(1 + options.repeats):
        for size in sizes:
            result = measure(options, *size)
            if turn > 0:
                found[size].append(result)
    print_table(options.text.stem, found)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Word vectors on one rank and on several.")
    parser.add_argument("text", type=Path, help="a text file, a sentence or paragraph a line")
    parser.add_argument("overrides", nargs="*", help="key=value settings")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=40, help="number of timed steps")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", default="runs/benchmark/cache", help="folder for the prepared text")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--weak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options: argparse.Namespace, ranks: int, kind: str) -> Result:
    """Returns what rank 0 of a run measured; for separate runs, the sum of their speeds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone"]
    with tempfile.TemporaryDirectory() as folder:
        processes, paths = [], []
        num_runs, ranks_per_run = (ranks, 1) if kind == "separate" else (1, ranks)
        for number in range(num_runs):
            paths.append(Path(folder) / f"result{number}.json")
            own = [__file__, str(options.text), *options.overrides, f"--steps={options.steps}", "--as-rank"]
            own += [f"--cache={options.cache}", f"--result={paths[-1]}", *(["--weak"] if kind == "weak" else [])]
            command = [sys.executable, *torchrun, f"--nproc-per-node={ranks_per_run}", *own]
            processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))
        if any([process.wait() for process in processes]):
            raise SystemExit(f"{kind} on {ranks} ranks failed")
        results: list[Result] = [json.loads(path.read_text()) for path in paths]
    return {**results[0], "words_per_second": sum(result["words_per_second"] for result in results)}


def run_rank(options: argparse.Namespace) -> None:
    """Trains as one rank, first by the clock, then under the profiler."""
    runtime = init_distributed(device="cpu")
    ranks = runtime.ranks
    settings = [f"data.path={options.text}", f"data.cache_path={options.cache}", "run.path=unused"]
    config = load_config("word2vec", [*settings, "train.step_growth=null", *options.overrides])
    if options.weak:
        config.train.words_per_step *= ranks.size
    corpus, _ = recipe.prepare(config, runtime)
    task = recipe.build(config, runtime, corpus).task

    def train(step: int) -> TextBatch:
        epoch, step_of_epoch = divmod(step, task.batches.steps_per_epoch)
        with stage("sample"):
            batch: TextBatch = task.batches.batch(epoch, step_of_epoch)
        train_step(task.model, task.optimizer, batch)
        return batch

    for step in range(WARMUP_STEPS):
        train(step)
    words, began = 0, time.perf_counter()
    for step in range(WARMUP_STEPS, WARMUP_STEPS + options.steps):
        words += train(step).num_examples
    seconds = time.perf_counter() - began
    tables: list[str] = []
    num_profiled = max(options.steps // 4, 5)
    with StepProfile(lambda _, table: tables.append(table), warmup_steps=0, num_steps=num_profiled) as profile:
        for step in range(num_profiled):
            train(WARMUP_STEPS + options.steps + step)
            profile.step()
    batch = task.batches.batch(0, 0)
    own = {"words": words, "bytes_per_word": bytes_between_ranks(task.model, batch) / batch.num_examples}
    of_ranks = ranks.all_gather(own)
    if runtime.rank == 0:
        result = {
            "words_per_second": sum(each["words"] for each in of_ranks) / seconds,
            "bytes_per_word": statistics.mean(each["bytes_per_word"] for each in of_ranks),
            "stages": stages_of(tables[0]),
        }
        options.result.write_text(json.dumps(result))
    et.shut_down()


def bytes_between_ranks(model: Word2Vec, batch: TextBatch) -> int:
    """Returns the bytes of a step that this rank exchanges: ids, counts and gradients it sends, and vectors it gets."""
    (rows,) = model.tables.table_groups
    size = rows.ranks.size
    tables = [[shard.spec.name for shard in rows.shards].index(name) for name in (INPUT, OUTPUT)]
    keys, _ = rows.keys_of(tables, [batch.sample.words, batch.sample.targets.flatten()])
    owners = sort_unique(keys, bound=size * rows.num_local_rows).unique // rows.num_local_rows
    num_foreign = int((owners != rows.ranks.rank).sum())
    dim = rows.shards[0].spec.dim
    return num_foreign * (_ID_BYTES + (_COUNT_BYTES if model.counts_rows else 0) + 2 * dim * _VALUE_BYTES)


def stages_of(table: str) -> dict[str, float]:
    """Reads milliseconds a step from a profile's table."""
    lines = [line.split() for line in table.splitlines()[2:]]
    return {words[0]: float(words[1]) for words in lines}


def print_table(corpus: str, found: dict[tuple[int, str], list[Result]]) -> None:
    """Prints and records the medians."""
    cores = len(os.sched_getaffinity(0))
    print(f"\n{corpus}: medians of {len(next(iter(found.values())))} turns (least to most); stages in ms per step\n")
    print(f"| ranks | words/s | to one rank | bytes per word | {' | '.join(STAGES)} |")
    print("| --- " * (4 + len(STAGES)) + "|")
    one = statistics.median(result["words_per_second"] for result in next(iter(found.values())))
    for (ranks, kind), results in found.items():
        speeds = [result["words_per_second"] for result in results]
        speed, num_bytes = statistics.median(speeds), results[0]["bytes_per_word"]
        name = f"{ranks}, {kind}{', oversubscribed' if ranks > cores else ''}"
        stages = [statistics.median(result["stages"].get(stage, 0.0) for result in results) for stage in STAGES]
        print(
            f"| {name} | {speed:,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) | {speed / one:.2f} | "
            f"{num_bytes:,.0f} | {' | '.join(f'{value:.2f}' for value in stages)} |"
        )
        row = Measure(f"{corpus}, {name}", "words/s, to one rank", speed, one, speed / one, ranks, 1)
        append_results("scaling", f"torch {torch.__version__}", [row])


if __name__ == "__main__":
    main()
