"""Quality of word vectors by the size of a step, with and without damping, and the picture of it in the docs.

    python benchmarks/large_steps.py train ../shared/data/text-en-wiki/wiki_a.txt --tests ../shared/data/eval-words \
        --words-per-step 16384 524288 --seeds 1 2 3 --damping curvature --growth 0.05 --lr 0.7
    python benchmarks/large_steps.py cost ../shared/data/text-en-wiki/wiki_a.txt
    python benchmarks/large_steps.py bytes ../shared/data/text-en-wiki/wiki_a.txt
    python benchmarks/large_steps.py table
    python benchmarks/large_steps.py picture docs/pictures/large_steps.svg

`train` appends a line per run to benchmarks/large_steps.csv. Each file of word tests is halved by a checksum of each
line's words: settings are chosen by one half ("choice") and reported on the other ("report").
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import os
import shutil
import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embedtrain import cli
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.data.skipgram import TextBatches
from embedtrain.distributed.runtime import init_distributed
from embedtrain.export.vectors import open_vectors, unit_rows
from embedtrain.metrics.analogies import evaluate_analogies
from embedtrain.metrics.word_similarity import evaluate_similarity
from embedtrain.optim import damping as damping_module
from embedtrain.optim import formulas
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.word2vec import model as word2vec_model
from embedtrain.recipes.word2vec import recipe
from embedtrain.sharding.layout import layout_of
from embedtrain.train.step import train_step

RESULTS_PATH = Path(__file__).with_name("large_steps.csv")
SIMILARITY = {
    "WordSim-353": "EN-WS-353-ALL.txt",
    "MEN": "EN-MEN-TR-3k.txt",
    "SimLex": "EN-SIMLEX-999.txt",
    "RG-65": "EN-RG-65.txt",
}
TESTS = [*SIMILARITY, "analogies"]
HALVES = ("choice", "report")
PARTS = {
    "counts": (word2vec_model, "count_of_rows"),
    "second moments": (damping_module, "_second_moments"),
    "eigenvectors": (damping_module, "top_eigenpairs"),
    "update": (formulas, "moment_update"),
}
"""Parts of a step that damping adds or slows down: the modules that call them, and their names there."""
KEYS = ("text", "epochs", "words_per_step", "damping", "growth", "lr")
COLUMNS = [*KEYS, "seed", "words_per_second", *(f"{half} {test}" for half in HALVES for test in TESTS)]
Row = dict[str, str]


def main() -> None:
    """Trains, or shows what was trained."""
    options = parse_options()
    if options.command == "train":
        for words_per_step, lr, seed in itertools.product(options.words_per_step, options.lr, options.seeds):
            row = train(options, words_per_step, lr, seed)
            print(line_of(row), flush=True)
            append(row)
    elif options.command == "cost":
        print_cost(options)
    elif options.command == "bytes":
        print_bytes(options)
    elif options.command == "table":
        print_table(read())
    else:
        draw(read(), options.path)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Quality of word vectors by the size of a step.")
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("train", help="train and measure")
    runs.add_argument("text", type=Path)
    runs.add_argument("overrides", nargs="*", help="key=value settings")
    runs.add_argument("--tests", type=Path, required=True, help="folder of questions-words.txt and EN-*.txt")
    runs.add_argument("--words-per-step", type=int, nargs="+", default=[524288])
    runs.add_argument("--lr", type=float, nargs="+", default=[0.6])
    runs.add_argument("--seeds", type=int, nargs="+", default=[1])
    runs.add_argument("--epochs", type=int, default=5)
    runs.add_argument("--damping", default="curvature")
    runs.add_argument("--growth", default="null")
    runs.add_argument("--work", type=Path, default=Path("runs/large_steps"))
    cost = commands.add_parser("cost", help="time plain and damped steps in turns, on one rank of one thread")
    cost.add_argument("text", type=Path)
    cost.add_argument("overrides", nargs="*", help="key=value settings")
    cost.add_argument("--words-per-step", type=int, default=524288)
    cost.add_argument("--turns", type=int, default=20)
    cost.add_argument("--work", type=Path, default=Path("runs/large_steps"))
    exchanged = commands.add_parser("bytes", help="count the bytes that a rank would exchange, without other ranks")
    exchanged.add_argument("text", type=Path)
    exchanged.add_argument("--words-per-step", type=int, nargs="+", default=[131072, 262144, 524288])
    exchanged.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64])
    exchanged.add_argument("--work", type=Path, default=Path("runs/large_steps"))
    commands.add_parser("table", help="print means over the seeds")
    picture = commands.add_parser("picture", help="draw the curve over sizes of a step")
    picture.add_argument("path", type=Path)
    return parser.parse_args()


def train(options: argparse.Namespace, words_per_step: int, lr: float, seed: int) -> Row:
    """Trains once and measures both halves of the tests."""
    run_path = options.work / f"run-{os.getpid()}"
    shutil.rmtree(run_path, ignore_errors=True)
    settings = {
        "data.path": options.text,
        "data.cache_path": options.work / "cache",
        "run.path": run_path,
        "run.device": "cpu",
        "log.tensorboard": "false",
        "log.every_steps": 1000,
        "seed": seed,
        "train.epochs": options.epochs,
        "train.words_per_step": words_per_step,
        "train.step_growth": options.growth,
        "word2vec.damping": options.damping,
        "optimizer.lr": lr,
    }
    config = Path(__file__).resolve().parents[1] / "configs" / "word2vec.yaml"
    status = cli.main(["train", str(config), *(f"{k}={v}" for k, v in settings.items()), *options.overrides])
    if status:
        raise SystemExit(status)
    with open_vectors(str(run_path)) as opened:
        words, unit = opened.words, unit_rows(opened.rows(0, opened.num_rows))
    with CheckpointReader(latest_checkpoint(f"{run_path}/checkpoints") or "") as reader:
        trained = reader.state["train"]
    shutil.rmtree(run_path)
    overrides = "".join(f" {override}" for override in options.overrides)
    row = dict(zip(KEYS, map(str, (options.text.stem + overrides, options.epochs, words_per_step)), strict=False))
    row |= {"damping": options.damping, "growth": options.growth, "lr": str(lr), "seed": str(seed)}
    row["words_per_second"] = f"{trained['examples'] / trained['seconds']:.0f}"
    for half, test in itertools.product(HALVES, TESTS):
        row[f"{half} {test}"] = f"{score(unit, words, options.tests, test, half):.4f}"
    return row


def print_cost(options: argparse.Namespace) -> None:
    """Prints medians of processor time per step and per part of it, for plain and for damped steps in turns."""
    torch.set_num_threads(1)
    runtime = init_distributed(device="cpu")
    tasks = {}
    for damping in ("none", "curvature"):
        settings = [
            f"data.path={options.text}",
            f"data.cache_path={options.work / 'cache'}",
            "run.path=unused",
            f"train.words_per_step={options.words_per_step}",
            "train.step_growth=null",
            f"word2vec.damping={damping}",
            *options.overrides,
        ]
        config = load_config("word2vec", settings)
        corpus, _ = recipe.prepare(config, runtime)
        tasks[damping] = recipe.build(config, runtime, corpus).task
    times: dict[str, list[dict[str, float]]] = {damping: [] for damping in tasks}
    of_step: dict[str, float] = {}
    for part, (module, function) in PARTS.items():
        setattr(module, function, timed(getattr(module, function), part, of_step))
    for turn in range(-2, options.turns):
        for damping, task in tasks.items():
            of_step.clear()
            started = time.process_time()
            # Both take the same words.
            train_step(task.model, task.optimizer, task.batches.batch(0, turn % task.batches.steps_per_epoch))
            if turn >= 0:
                times[damping].append({**of_step, "whole step": time.process_time() - started})
    for part in (*PARTS, "whole step"):
        medians = (statistics.median(own.get(part, 0.0) for own in found) * 1e3 for found in times.values())
        print(f"{part:16}", *(f"{damping} {median:6.1f} ms  " for damping, median in zip(times, medians, strict=True)))
    ratios = [damped["whole step"] / plain["whole step"] for plain, damped in zip(*times.values(), strict=True)]
    print(f"a damped step takes {statistics.median(ratios):.3f} of a plain one's time")


def print_bytes(options: argparse.Namespace) -> None:
    """Prints the bytes per word of the middle rank's share: for plain steps of 16,384 words, and for damped steps."""
    settings = [f"data.path={options.text}", f"data.cache_path={options.work / 'cache'}", "run.path=unused"]
    config = load_config("word2vec", settings)
    corpus, _ = recipe.prepare(config, init_distributed(device="cpu"))
    sampling = recipe.sampling_options(config)
    steps = [("none", 16384), *(("curvature", words) for words in options.words_per_step)]
    print(f"| ranks | {' | '.join(f'{damping}, {words:,} words' for damping, words in steps)} |")
    print(f"| --- {'| --- ' * len(steps)}|")
    for ranks in options.ranks:
        found = []
        for damping, words in steps:
            block_words = min(config.train.block_words, words // ranks)  # every rank has a block
            batch = TextBatches(
                corpus,
                dataclasses.replace(sampling, negative_parts=max(sampling.negative_parts, ranks)),
                block_words=block_words,
                blocks_per_step=words // block_words,
                seed=1,
                rank=ranks // 2,
                world_size=ranks,
            ).batch(0, 1)
            ids = (batch.sample.words, batch.sample.targets)
            num_foreign = sum(count_foreign(each, len(corpus.vocabulary), ranks) for each in ids)
            found.append(bytes_of(num_foreign, config.table.dim, ranks, damping) / batch.num_examples)
        print(f"| {ranks} | {' | '.join(f'{value:,.0f}' for value in found)} |")


def count_foreign(ids: torch.Tensor, num_rows: int, num_ranks: int) -> int:
    """Returns the number of distinct ids that the middle rank does not own."""
    layout = layout_of(num_rows, num_ranks)
    owners, _ = layout.owner_of(layout.slot_of(ids.unique()))
    return int((owners != num_ranks // 2).sum())


def bytes_of(num_foreign: int, dim: int, num_ranks: int, damping: str) -> float:
    """Returns the bytes that a rank exchanges in a step, if it asks other ranks for `num_foreign` rows.

    A row takes an id, a vector and a gradient. With damping, it also takes a count, and the ranks sum a histogram of
    3,072 bytes and two matrices. A ring all-reduce sends `2 * (1 - 1 / num_ranks)` of its bytes per rank.
    """
    if damping == "none":
        return num_foreign * 4.0 * (1 + 2 * dim)
    return num_foreign * 4.0 * (2 + 2 * dim) + 2 * (1 - 1 / num_ranks) * (3072 + 2 * 4 * (dim**2 + 1))


def timed(function: Callable[..., Any], part: str, times: dict[str, float]) -> Callable[..., Any]:
    """Returns the function, which now adds its processor time to an entry of `times`."""

    @functools.wraps(function)
    def measured(*args: Any, **options: Any) -> Any:
        started = time.process_time()
        try:
            return function(*args, **options)
        finally:
            times[part] = times.get(part, 0.0) + time.process_time() - started

    return measured


def score(unit: np.ndarray, words: Sequence[str], tests: Path, test: str, half: str) -> float:
    """Returns the correlation or accuracy on one half of a test."""
    path = tests / SIMILARITY.get(test, "questions-words.txt")
    lines = list(half_of(path.read_text().splitlines(), half))
    if test == "analogies":
        return float(evaluate_analogies(unit, words, lines).total.accuracy)
    return float(evaluate_similarity(unit, words, lines).spearman)


def half_of(lines: Sequence[str], half: str) -> Iterator[str]:
    """Yields the lines of one half, and the titles of sections; a pair is in the same half in either order."""
    for line in lines:
        if line.startswith((":", "#")):
            yield line
            continue
        number = 4 if len(line.split()) == 4 else 2
        checksum = zlib.crc32(" ".join(sorted(line.lower().split()[:number])).encode())
        if checksum % 2 == HALVES.index(half):
            yield line


def append(row: Row) -> None:
    """Appends a run to the results."""
    is_new = not RESULTS_PATH.exists()
    with RESULTS_PATH.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def read() -> dict[tuple[str, ...], list[Row]]:
    """Returns the runs by their settings, the seeds of each together."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    with RESULTS_PATH.open(newline="") as file:
        for row in csv.DictReader(file):
            groups.setdefault(tuple(row[key] for key in KEYS), []).append(row)
    return groups


def mean(rows: Sequence[Row], half: str, tests: Sequence[str] = TESTS) -> float:
    """Returns the mean over tests and seeds."""
    return statistics.mean(float(row[f"{half} {test}"]) for row in rows for test in tests)


def line_of(row: Row) -> str:
    """Returns a run as a line of text."""
    return f"{' '.join(row[key] for key in (*KEYS, 'seed'))}: " + ", ".join(
        f"{half} {mean([row], half):.4f}" for half in HALVES
    )


def print_table(groups: dict[tuple[str, ...], list[Row]]) -> None:
    """Prints means over the seeds as Markdown."""
    titles = [*KEYS, "seeds", *HALVES, *TESTS]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for key, rows in sorted(groups.items(), key=lambda group: (*group[0][:2], group[0][3], int(group[0][2]), group[0])):
        means = [mean(rows, half) for half in HALVES] + [mean(rows, "report", [test]) for test in TESTS]
        print(f"| {' | '.join([*key, str(len(rows)), *(f'{value:.3f}' for value in means)])} |")


def draw(groups: dict[tuple[str, ...], list[Row]], path: Path) -> None:
    """Draws the mean of the tests by words per step.

    Damped steps have the default rate and growth. Plain steps have, for each size, the rate with the most seeds; of
    several, the one that the half for choices prefers.
    """
    import matplotlib.pyplot as plt

    defaults = load_config("word2vec", ["data.path=unused", "run.path=unused"])
    damped = str(defaults.train.step_growth), str(defaults.optimizer.lr)
    groups = {key: rows for key, rows in groups.items() if key[3] == "none" or key[4:] == damped}
    # A text is drawn if it has a curve, of three sizes or more.
    kinds = {(text, damping) for text, _, _, damping, _, _ in groups}
    sizes_of = {kind: {key[2] for key in groups if (key[0], key[3]) == kind} for kind in kinds}
    texts = sorted({text for (text, _), sizes in sizes_of.items() if len(sizes) > 2})
    figure, axes = plt.subplots(1, len(texts), figsize=(4.5 * len(texts), 3.4), squeeze=False)
    for axis, text in zip(axes[0], texts, strict=True):
        for damping, label in (("none", "plain steps"), ("curvature", "damped steps")):
            best: dict[int, list[Row]] = {}
            for key, rows in groups.items():
                if (key[0], key[3]) == (text, damping):
                    found = best.get(int(key[2]))
                    if found is None or _preference(rows) > _preference(found):
                        best[int(key[2])] = rows
            sizes = sorted(best)
            axis.plot(sizes, [mean(best[size], "report") for size in sizes], "o-", label=label)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set_title(text)
        axis.set_xlabel("words per step")
        axis.set_ylabel("mean of five word tests")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path)


def _preference(rows: list[Row]) -> tuple[int, float]:
    """Orders rates by their number of seeds, and rates of equally many seeds by the half for choices."""
    return len(rows), mean(rows, "choice")


if __name__ == "__main__":
    main()
