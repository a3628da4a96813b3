"""Malformed command lines and configurations get a clear refusal, and change nothing in the run folder."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.commands.fuzz import Command, call, contents, half_written, restore, spoilt, spoilt_file

ROOT = Path(__file__).resolve().parents[3]

CONFIG = (
    "model: word2vec\n"
    "data: {path: corpus.txt, cache_path: cache, min_count: 1}\n"
    "table: {dim: 4}\n"
    "optimizer: {name: rowwise_adagrad, lr: 0.1}\n"
    "train: {epochs: 1, words_per_step: 64, block_words: 32}\n"
    "run: {path: run, device: cpu}\n"
    "log: {every_steps: 10, tensorboard: false}\n"
    "checkpoint: {mode: sync, every_steps: 5}\n"
)
TRAIN = Command(["train", "config.yaml", "run.path=run", "optimizer.lr=0.2", "train.epochs=1"])
READING = [
    Command(["inspect", "run", "--verify"]),
    Command(["diff", "run", "run/checkpoints/step-000000005", "--top", "3", "--table", "input"]),
    Command(["neighbors", "run", "aa", "-", "bb", "+", "cc", "--top", "3"]),
    Command(["evaluate", "run", "--similarity", "pairs.tsv", "--restrict-vocab", "10", "--table", "input"]),
    Command(["export", "run", "--format", "npy", "--output", "out.npy", "--max-rows", "3", "--overwrite"]),
    Command(["recommend", "run", "user", "--top", "3", "--all", "--output", "top.parquet"]),
    Command(["report", "run", "--word", "nowhere", "--output", "page.html"]),
    Command(["completion", "bash"]),
]
CONFIGURING = [
    Command(["config", "show", "config.yaml", "optimizer.lr=0.1", "table.dim=8"], fixed=2),
    Command(["config", "show", "model=ranking", "data.path=a.csv", "data.categorical=[a,b]"], fixed=2),
    Command(["config", "show", "model=retrieval", "data.path=a.csv", "evaluate.k=[5,10]"], fixed=2),
    Command(["plan", "config.yaml", "--rows", "1000", "--world-size", "4", "--memory", "16GiB", "--skew", "1.1"]),
    Command(["plan", str(ROOT / "configs/ranking.yaml"), "--rows", "1e6", "--hosts", "2", "--world-size", "8"]),
    Command(["compare", "nowhere.yaml", "optimizer.lr=0.1", "--optimizers", "adam,sgd", "--rates", "adam=0.1"]),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder, three deep, with a finished run in it."""
    folder = tmp_path_factory.mktemp("fuzz") / "two" / "three"
    folder.mkdir(parents=True)
    generator = random.Random(1)
    words = [f"{letter}{letter}" for letter in "abcdefghij"]
    lines = [" ".join(generator.choices(words, k=8)) for _ in range(60)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "nowhere.yaml").write_text(CONFIG.replace("corpus.txt", "nowhere.txt"))
    (folder / "pairs.tsv").write_text("aa\tbb\t3\ncc\tdd\t1\naa\tee\t2\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome = call(["train", "config.yaml", *TRAIN.arguments[2:]])
    assert outcome.status == 0, outcome.printed
    shutil.copytree(folder / "run", folder / "kept")
    return folder


@pytest.fixture
def here(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    monkeypatch.setenv("HOME", str(finished))
    (finished / "config.yaml").write_text(CONFIG)
    return finished


def check(here: Path, arguments: Sequence[str], before: dict[str, bytes]) -> None:
    """Runs a command line; what it did must be clear to the user and leave the run whole."""
    outcome = call(arguments)
    said = f"{list(arguments)}\n{outcome.printed[-3000:]}"
    if outcome.error is not None:
        raise AssertionError(said) from outcome.error
    # Two answers that are no mistakes: a plan that does not fit, and a learning rate with which a loss overflows.
    answers = ("DOES NOT FIT", "the loss is", "is not finite")
    is_answer = outcome.status == 1 and any(answer in outcome.printed for answer in answers)
    assert outcome.status in (0, 2) or is_answer, said
    assert "Traceback" not in outcome.printed, said
    assert outcome.status == 0 or is_answer or "embedtrain: error: " in outcome.printed, said
    assert not list(half_written(here / "run")), said
    if contents(here / "run") != before:
        assert outcome.status == 0, said
        restore(here / "run", here / "kept")


@pytest.mark.parametrize(("commands", "count"), [(READING, 800), (CONFIGURING, 700), ([TRAIN], 200)])
def test_malformed_command_lines(here: Path, commands: Sequence[Command], count: int, runs_all: bool) -> None:
    generator = random.Random(len(commands))
    before = contents(here / "run")
    for number in range(count if runs_all else count // 10):
        check(here, spoilt(commands[number % len(commands)], generator), before)


def test_malformed_configuration_files(here: Path, runs_all: bool) -> None:
    generator = random.Random(7)
    before = contents(here / "run")
    for number in range(300 if runs_all else 30):
        (here / "config.yaml").write_bytes(spoilt_file(CONFIG, generator))
        command = ["train", "config.yaml"] if number % 4 == 0 else ["config", "show", "config.yaml"]
        check(here, command, before)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))])
def test_malformed_command_lines_of_the_program_itself(here: Path, seed: int) -> None:
    arguments = spoilt(TRAIN, random.Random(seed))
    before = contents(here / "run")
    done = subprocess.run(
        [sys.executable, "-m", "embedtrain", *arguments], capture_output=True, text=True, errors="replace", timeout=120
    )
    assert done.returncode in (0, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or contents(here / "run") == before
    restore(here / "run", here / "kept")
