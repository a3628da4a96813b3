"""Word vectors beside gensim: words per second on one core and on two, and quality, on the same words, in one run.

    python benchmarks/word_vectors.py ../shared/data/text-en-wiki/wiki_a.txt --tests ../shared/data/eval-words

Both sides train on a text of lower-cased words of the letters a to z: embedtrain through its command line, one rank of
one thread a core, gensim from a `corpus_file` with a worker a core. For speed they take turns of `--speed-epochs` each,
after a first turn that does not count; words per second are words of the text in the vocabulary by the time spent
training (reading the vocabulary left out on both sides). For quality both train `--epochs` for each of `--seeds`, and
gensim judges both.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gensim
import torch
from gensim.models import KeyedVectors, Word2Vec
from record import ROOT, Measure, append_results

from embedtrain.checkpoint import CheckpointReader, latest_checkpoint

SIMILARITY = {
    "WordSim-353": "EN-WS-353-ALL.txt",
    "MEN": "EN-MEN-TR-3k.txt",
    "SimLex": "EN-SIMLEX-999.txt",
    "RG-65": "EN-RG-65.txt",
}
OURS, PEER = "embedtrain", "gensim"
Measures = dict[str, float]


@dataclass(frozen=True)
class Settings:
    """What both sides are given."""

    text_path: Path
    work_path: Path
    dim: int
    overrides: list[str]


def main() -> None:
    """Runs both sides and prints the tables."""
    options = parse_options()
    work_path = options.work / options.text.stem
    work_path.mkdir(parents=True, exist_ok=True)
    text_path = clean_text(options.text, work_path, options.lines)
    settings = Settings(text_path, work_path, options.dim, options.overrides)
    if options.repeats:
        print_speeds(
            options.text.stem,
            compare_speeds(settings, options.cores, options.repeats, options.speed_epochs),
            options.cores,
        )
    if options.seeds:
        ours, peers = compare_quality(settings, options)
        print_quality(options.text.stem, ours, peers, max(options.cores))


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Word vectors beside gensim, on the same words.")
    parser.add_argument("text", type=Path, help="a text file, a sentence or paragraph a line")
    parser.add_argument("overrides", nargs="*", help="key=value settings for embedtrain")
    parser.add_argument("--tests", type=Path, help="folder of questions-words.txt and EN-*.txt, for quality")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="folder for what is trained")
    parser.add_argument("--lines", type=int, help="take so many lines of the text only")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2], help="ranks of one thread, gensim's workers")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side for speed; 0 leaves speed out")
    parser.add_argument("--speed-epochs", type=int, default=5, help="of the runs for speed")
    parser.add_argument("--seeds", type=int, default=3, help="for quality; 0 leaves it out")
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=5, help="of the runs for quality")
    options = parser.parse_args()
    if options.seeds and options.tests is None:
        parser.error("quality is judged by the word tests: give --tests FOLDER, or --seeds 0")
    return options


def compare_speeds(
    settings: Settings, cores: Sequence[int], repeats: int, epochs: int
) -> dict[str, dict[int, list[float]]]:
    """Returns words per second of each side by number of cores, a value a turn."""
    speeds: dict[str, dict[int, list[float]]] = {side: {count: [] for count in cores} for side in (OURS, PEER)}
    model = prepare_gensim(settings, seed=1)
    for turn in range(1 + repeats):
        for count in cores:
            found = {
                OURS: speed_of(train_embedtrain(settings, 1, count, epochs)),
                PEER: train_gensim(model, settings, count, epochs),
            }
            for side, speed in found.items():
                print(f"turn {turn}, {count} cores, {side}: {speed:,.0f} words/s", flush=True)
                if turn > 0:
                    speeds[side][count].append(speed)
    return speeds


def compare_quality(settings: Settings, options: argparse.Namespace) -> tuple[list[Measures], list[Measures]]:
    """Returns the measures of each side, a value a seed."""
    ours, peers = [], []
    cores = max(options.cores)
    for seed in range(1, options.seeds + 1):
        ours.append(measure(export(train_embedtrain(settings, seed, cores, options.epochs)), options.tests))
        print(f"{OURS}, seed {seed}: {line_of(ours[-1])}", flush=True)
        model = prepare_gensim(settings, seed)
        train_gensim(model, settings, cores, options.epochs)
        peers.append(measure(model.wv, options.tests))
        print(f"{PEER}, seed {seed}: {line_of(peers[-1])}", flush=True)
    return ours, peers


def clean_text(path: Path, work_path: Path, num_lines: int | None) -> Path:
    """Writes the text as lower-cased words of letters, so that both sides read the same words."""
    cleaned = work_path / ("text.txt" if num_lines is None else f"text-{num_lines}.txt")
    if not cleaned.exists() or cleaned.stat().st_mtime < path.stat().st_mtime:
        with path.open(encoding="utf-8") as source, cleaned.open("w", encoding="utf-8") as target:
            for line in itertools.islice(source, num_lines):
                words = re.findall("[a-z]+", line.lower())
                if words:
                    target.write(" ".join(words) + "\n")
    return cleaned


def train_embedtrain(settings: Settings, seed: int, ranks: int, epochs: int) -> Path:
    """Trains through the command line and returns the run's folder."""
    run_path = settings.work_path / f"embedtrain-{seed}-{time.time_ns()}"
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    subprocess.run(
        [
            sys.executable,
            *torchrun,
            "-m",
            "embedtrain",
            "train",
            str(ROOT / "configs" / "word2vec.yaml"),
            f"data.path={settings.text_path}",
            f"data.cache_path={settings.work_path / 'cache'}",
            "data.tokenizer=whitespace",
            f"run.path={run_path}",
            "log.tensorboard=false",
            f"seed={seed}",
            f"table.dim={settings.dim}",
            f"train.epochs={epochs}",
            *settings.overrides,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return run_path


def speed_of(run_path: Path) -> float:
    """Returns a run's words per second."""
    checkpoint_path = latest_checkpoint(f"{run_path}/checkpoints")
    assert checkpoint_path is not None
    with CheckpointReader(checkpoint_path) as reader:
        trained = reader.state["train"]
    shutil.rmtree(run_path)
    return float(trained["examples"] / trained["seconds"])


def export(run_path: Path) -> KeyedVectors:
    """Returns a run's vectors as gensim reads them."""
    vectors_path = run_path / "vectors.bin"
    command = ["export", str(run_path), "--format", "word2vec-binary", "--output", str(vectors_path)]
    subprocess.run([sys.executable, "-m", "embedtrain", *command], stdout=subprocess.DEVNULL, check=True)
    return KeyedVectors.load_word2vec_format(str(vectors_path), binary=True)


def prepare_gensim(settings: Settings, seed: int) -> Word2Vec:
    """Returns a model of gensim's that has read the vocabulary."""
    model = Word2Vec(
        sg=1, vector_size=settings.dim, window=5, negative=5, min_count=5, sample=1e-3, seed=seed, workers=1
    )
    model.build_vocab(corpus_file=str(settings.text_path))
    return model


def train_gensim(model: Word2Vec, settings: Settings, workers: int, epochs: int) -> float:
    """Trains from first values and returns words per second."""
    model.workers = workers
    model.init_weights()
    num_words = sum(model.wv.get_vecattr(word, "count") for word in model.wv.index_to_key)
    start = time.perf_counter()
    model.train(
        corpus_file=str(settings.text_path),
        total_examples=model.corpus_count,
        total_words=model.corpus_total_words,
        epochs=epochs,
    )
    return num_words * epochs / (time.perf_counter() - start)


def measure(vectors: KeyedVectors, tests_path: Path) -> Measures:
    """Returns accuracy on the analogies and Spearman's correlation on each set of word pairs."""
    accuracy, _ = vectors.evaluate_word_analogies(str(tests_path / "questions-words.txt"))
    measures = {"analogies": float(accuracy)}
    for name, file_name in SIMILARITY.items():
        measures[name] = float(vectors.evaluate_word_pairs(str(tests_path / file_name))[1][0])
    return measures


def line_of(measures: Measures) -> str:
    """Returns measures as a line of text."""
    return "  ".join(f"{name} {value:.3f}" for name, value in measures.items())


def print_speeds(corpus: str, speeds: dict[str, dict[int, list[float]]], cores: Sequence[int]) -> None:
    """Prints and records the medians with their spread, the ratio to the peer, and that to one core."""
    turns = len(speeds[OURS][cores[0]])
    print(f"\n{corpus}: words/s, median of {turns} turns (least to most)\n")
    print(f"| cores | {OURS} | {PEER} | ratio | {OURS}, to {cores[0]} core |")
    print("| --- | --- | --- | --- | --- |")
    first = statistics.median(speeds[OURS][cores[0]])
    for count in cores:
        middle = [statistics.median(speeds[side][count]) for side in (OURS, PEER)]
        cells = [
            f"{value:,.0f} ({min(speeds[side][count]):,.0f} to {max(speeds[side][count]):,.0f})"
            for side, value in zip((OURS, PEER), middle, strict=True)
        ]
        ratio = middle[0] / middle[1]
        print(f"| {count} | {cells[0]} | {cells[1]} | {ratio:.2f} | {middle[0] / first:.2f} |")
        record([Measure(corpus, "words/s", *middle, ratio, count, 1)])


def print_quality(corpus: str, ours: list[Measures], peers: list[Measures], cores: int) -> None:
    """Prints and records mean and standard deviation of both sides, and the ratio of the means."""
    print(f"\n{corpus}: quality, mean of {len(ours)} seeds (standard deviation)\n")
    print(f"| measure | {OURS} | {PEER} | ratio |")
    print("| --- | --- | --- | --- |")
    for name in ours[0]:
        cells, means = [], []
        for side in (ours, peers):
            values = [measures[name] for measures in side]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            means.append(statistics.mean(values))
            cells.append(f"{means[-1]:.3f} ({spread:.3f})")
        print(f"| {name} | {cells[0]} | {cells[1]} | {means[0] / means[1]:.2f} |")
        record([Measure(corpus, name, *means, means[0] / means[1], cores, 1)])


def record(measures: list[Measure]) -> None:
    """Appends rows to the record of all benchmarks."""
    append_results("word_vectors", f"torch {torch.__version__}, gensim {gensim.__version__}", measures)


if __name__ == "__main__":
    main()
