"""How word-vector training scales with ranks: speed, bytes between ranks, and the seconds of each stage.

    python benchmarks/scaling.py ../shared/data/text-en-wiki/wiki_a.txt

Ranks of one thread each train skip-gram steps on the same text. Strong: all ranks share a step of 16,384 words; weak:
each rank has as many. The runs of different sizes take turns; figures are medians after a turn that does not count.
Runs of more ranks than there are cores are marked. Stages lie inside others: exchange is what waiting for other ranks
and copying their rows take, wherever in the step.
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
from embedtrain.data.prepare import CorpusOptions, prepare_corpus
from embedtrain.data.skipgram import SamplingOptions, TextBatch, TextBatches
from embedtrain.distributed.runtime import init_distributed
from embedtrain.distributed.stages import stage
from embedtrain.ops.sort_unique import sort_unique
from embedtrain.optim import RowwiseAdagrad
from embedtrain.recipes.word2vec.model import INPUT, OUTPUT, Word2Vec
from embedtrain.train.profile import StepProfile
from embedtrain.train.step import train_step

WORDS_PER_STEP, BLOCK_WORDS, DIM = 16384, 512, 100
STAGES = ["sample", "unique", "exchange", "kernel", "update"]
_ID_BYTES, _VALUE_BYTES = 4, 4


def main() -> None:
    """Runs every size in turn and prints the table; as a rank, trains."""
    options = parse_options()
    if options.as_rank:
        run_rank(options)
        return
    sizes = [(ranks, is_weak) for ranks in options.ranks for is_weak in (False, True) if ranks > 1 or not is_weak]
    found: dict[tuple[int, bool], list[dict[str, Any]]] = {size: [] for size in sizes}
    for turn in range(1 + options.repeats):
        for size in sizes:
            result = start(options, *size)
            if turn > 0:
                found[size].append(result)
    print_table(options.text.stem, found)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Word vectors on one rank and on several.")
    parser.add_argument("text", type=Path, help="a text file, a sentence or paragraph a line")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=200, help="that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", default="runs/benchmark/cache", help="folder for the prepared text")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--weak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def start(options: argparse.Namespace, ranks: int, is_weak: bool) -> dict[str, Any]:
    """Runs the ranks and returns what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        result_path = Path(folder) / "result.json"
        own = [__file__, str(options.text), f"--steps={options.steps}", f"--cache={options.cache}", "--as-rank"]
        own += [f"--result={result_path}", *(["--weak"] if is_weak else [])]
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *torchrun, *own], env=environment, stderr=subprocess.DEVNULL, check=True)
        result: dict[str, Any] = json.loads(result_path.read_text())
        return result


def run_rank(options: argparse.Namespace) -> None:
    """Trains as one rank, first by the clock, then under the profiler."""
    runtime = init_distributed(device="cpu")
    ranks = runtime.ranks
    corpus = prepare_corpus(CorpusOptions(path=str(options.text)), options.cache, ranks)
    words_per_step = WORDS_PER_STEP * (ranks.size if options.weak else 1)
    batches = TextBatches(
        corpus,
        SamplingOptions(negative_parts=4),
        block_words=BLOCK_WORDS,
        blocks_per_step=words_per_step // BLOCK_WORDS,
        seed=1,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    model = Word2Vec(len(corpus.vocabulary), DIM, seed=1)
    optimizer = RowwiseAdagrad(model.tables, lr=0.6, initial_accumulator_value=100.0)
    num_profiled = max(options.steps // 4, 10)
    warmup = 10

    def train(step: int) -> TextBatch:
        epoch, step_of_epoch = divmod(step, batches.steps_per_epoch)
        with stage("sample"):
            batch = batches.batch(epoch, step_of_epoch)
        train_step(model, optimizer, batch)
        return batch

    for step in range(warmup):
        train(step)
    words, began = 0, time.perf_counter()
    for step in range(warmup, warmup + options.steps):
        words += train(step).num_examples
    seconds = time.perf_counter() - began
    tables: list[str] = []
    with StepProfile(lambda _, table: tables.append(table), warmup_steps=0, num_steps=num_profiled) as profile:
        for step in range(num_profiled):
            train(warmup + options.steps + step)
            profile.step()
    batch = batches.batch(0, 0)
    own = {"words": words, "bytes_per_word": bytes_between_ranks(model, batch) / batch.num_examples}
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
    """Returns the bytes that a step moves for this rank: ids and gradients to other ranks, vectors from them."""
    (rows,) = model.tables.table_groups
    size = rows.ranks.size
    tables = [[shard.spec.name for shard in rows.shards].index(name) for name in (INPUT, OUTPUT)]
    keys, _ = rows.keys_of(tables, [batch.sample.words, batch.sample.targets.flatten()])
    owners = sort_unique(keys, bound=size * rows.num_local_rows).unique // rows.num_local_rows
    num_foreign = int((owners != rows.ranks.rank).sum())
    return num_foreign * (_ID_BYTES + 2 * DIM * _VALUE_BYTES)


def stages_of(table: str) -> dict[str, float]:
    """Reads milliseconds a step from a profile's table."""
    lines = [line.split() for line in table.splitlines()[2:]]
    return {words[0]: float(words[1]) for words in lines}


def print_table(corpus: str, found: dict[tuple[int, bool], list[dict[str, Any]]]) -> None:
    """Prints and records the medians."""
    cores = len(os.sched_getaffinity(0))
    print(f"\n{corpus}: median of {len(next(iter(found.values())))} turns (least to most); stages in ms a step\n")
    print(f"| ranks | words/s | to one rank | bytes a word | {' | '.join(STAGES)} |")
    print("| --- " * (4 + len(STAGES)) + "|")
    one = statistics.median(result["words_per_second"] for result in next(iter(found.values())))
    for (ranks, is_weak), results in found.items():
        speeds = [result["words_per_second"] for result in results]
        speed, num_bytes = statistics.median(speeds), results[0]["bytes_per_word"]
        name = f"{ranks}, {'weak' if is_weak else 'strong'}{', oversubscribed' if ranks > cores else ''}"
        stages = [statistics.median(result["stages"].get(name, 0.0) for result in results) for name in STAGES]
        print(
            f"| {name} | {speed:,.0f} ({min(speeds):,.0f} to {max(speeds):,.0f}) | {speed / one:.2f} | "
            f"{num_bytes:,.0f} | {' | '.join(f'{value:.2f}' for value in stages)} |"
        )
        measure = Measure(f"{corpus}, {name}", "words/s, to one rank", speed, one, speed / one, ranks, 1)
        append_results("scaling", f"torch {torch.__version__}", [measure])


if __name__ == "__main__":
    main()
