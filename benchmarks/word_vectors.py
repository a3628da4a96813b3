"""Word vectors beside gensim: quality and words per second, on the same words, in one run.

    python benchmarks/word_vectors.py ../shared/data/text-en-wiki/wiki_a.txt --tests ../shared/data/eval-words

Both sides train in turn, seed by seed, on a text of lower-cased words of the letters a to z: embedtrain through its
command line under torchrun, gensim from a `corpus_file` with as many workers as embedtrain has ranks. gensim itself
judges both. Words per second are words of the text in the vocabulary, over all epochs, by the time spent training
(reading the vocabulary left out on both sides).
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
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
SPEED = "words/s"


@dataclass(frozen=True)
class Settings:
    """What both sides are given."""

    text_path: Path
    tests_path: Path
    work_path: Path
    ranks: int
    dim: int
    epochs: int
    overrides: list[str]


def main() -> None:
    """Runs both sides and prints the table."""
    options = parse_options()
    work_path = options.work / options.text.stem
    work_path.mkdir(parents=True, exist_ok=True)
    text_path = clean_text(options.text, work_path)
    settings = Settings(
        text_path, options.tests, work_path, options.ranks, options.dim, options.epochs, options.overrides
    )
    ours: list[dict[str, float]] = []
    peers: list[dict[str, float]] = []
    for seed in range(1, options.seeds + 1):
        ours.append(run_embedtrain(settings, seed))
        print(f"embedtrain, seed {seed}: {line_of(ours[-1])}", flush=True)
        peers.append(run_gensim(settings, seed))
        print(f"gensim,     seed {seed}: {line_of(peers[-1])}", flush=True)
    print_table(options.text.stem, ours, peers)
    record(options.text.stem, settings, ours, peers)


def parse_options() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Word vectors beside gensim, on the same words.")
    parser.add_argument("text", type=Path, help="a text file, a sentence or paragraph a line")
    parser.add_argument("overrides", nargs="*", help="key=value settings for embedtrain")
    parser.add_argument("--tests", type=Path, required=True, help="folder of questions-words.txt and EN-*.txt")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark"), help="folder for what is trained")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of one thread each, and gensim's workers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dim", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=5)
    return parser.parse_args()


def clean_text(path: Path, work_path: Path) -> Path:
    """Writes the text as lower-cased words of letters, so that both sides read the same words."""
    cleaned = work_path / "text.txt"
    if not cleaned.exists() or cleaned.stat().st_mtime < path.stat().st_mtime:
        with path.open(encoding="utf-8") as source, cleaned.open("w", encoding="utf-8") as target:
            for line in source:
                words = re.findall("[a-z]+", line.lower())
                if words:
                    target.write(" ".join(words) + "\n")
    return cleaned


def run_embedtrain(settings: Settings, seed: int) -> dict[str, float]:
    """Trains through the command line and returns the measures."""
    run_path = settings.work_path / f"embedtrain-{seed}-{time.time_ns()}"
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.ranks}", "-m"]
    subprocess.run(
        [
            sys.executable,
            *(command if settings.ranks > 1 else ["-m"]),
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
            f"train.epochs={settings.epochs}",
            *settings.overrides,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        check=True,
    )
    vectors_path = run_path / "vectors.bin"
    export = ["export", str(run_path), "--format", "word2vec-binary", "--output", str(vectors_path)]
    subprocess.run([sys.executable, "-m", "embedtrain", *export], stdout=subprocess.DEVNULL, check=True)
    checkpoint_path = latest_checkpoint(f"{run_path}/checkpoints")
    assert checkpoint_path is not None
    with CheckpointReader(checkpoint_path) as reader:
        trained = reader.state["train"]
    vectors = KeyedVectors.load_word2vec_format(str(vectors_path), binary=True)
    return {**measure(vectors, settings.tests_path), SPEED: trained["examples"] / trained["seconds"]}


def run_gensim(settings: Settings, seed: int) -> dict[str, float]:
    """Trains with gensim and returns the measures."""
    model = Word2Vec(
        sg=1,
        vector_size=settings.dim,
        window=5,
        negative=5,
        min_count=5,
        sample=1e-3,
        seed=seed,
        workers=settings.ranks,
    )
    model.build_vocab(corpus_file=str(settings.text_path))
    num_words = sum(model.wv.get_vecattr(word, "count") for word in model.wv.index_to_key)
    start = time.perf_counter()
    model.train(
        corpus_file=str(settings.text_path),
        total_examples=model.corpus_count,
        total_words=model.corpus_total_words,
        epochs=settings.epochs,
    )
    seconds = time.perf_counter() - start
    return {**measure(model.wv, settings.tests_path), SPEED: num_words * settings.epochs / seconds}


def measure(vectors: KeyedVectors, tests_path: Path) -> dict[str, float]:
    """Returns accuracy on the analogies and Spearman's correlation on each set of word pairs."""
    accuracy, _ = vectors.evaluate_word_analogies(str(tests_path / "questions-words.txt"))
    measures = {"analogies": float(accuracy)}
    for name, file_name in SIMILARITY.items():
        measures[name] = float(vectors.evaluate_word_pairs(str(tests_path / file_name))[1][0])
    return measures


def line_of(measures: dict[str, float]) -> str:
    """Returns measures as a line of text."""
    return "  ".join(f"{name} {format_value(name, value)}" for name, value in measures.items())


def format_value(name: str, value: float) -> str:
    """Returns a measure as text."""
    return f"{value:,.0f}" if name == SPEED else f"{value:.3f}"


def print_table(corpus: str, ours: list[dict[str, float]], peers: list[dict[str, float]]) -> None:
    """Prints mean and standard deviation of both sides, and the ratio of the means."""
    print(f"\n{corpus}: mean of {len(ours)} seeds (standard deviation)\n")
    print("| measure | embedtrain | gensim | ratio |")
    print("| --- | --- | --- | --- |")
    for name in ours[0]:
        cells = []
        for side in (ours, peers):
            values = [measures[name] for measures in side]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{format_value(name, statistics.mean(values))} ({format_value(name, spread)})")
        ratio = statistics.mean(m[name] for m in ours) / statistics.mean(m[name] for m in peers)
        print(f"| {name} | {cells[0]} | {cells[1]} | {ratio:.2f} |")


def record(corpus: str, settings: Settings, ours: list[dict[str, float]], peers: list[dict[str, float]]) -> None:
    """Appends a row per measure to the record of all benchmarks."""
    means = {name: [statistics.mean(m[name] for m in side) for side in (ours, peers)] for name in ours[0]}
    append_results(
        "word_vectors",
        f"torch {torch.__version__}, gensim {gensim.__version__}",
        [Measure(corpus, name, *pair, pair[0] / pair[1], settings.ranks, 1) for name, pair in means.items()],
    )


if __name__ == "__main__":
    main()
