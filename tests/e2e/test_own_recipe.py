"""A user's own model in a package of its own: docs/examples/own_recipe, installed and run as a user does."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from embedtrain import cli
from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from tests.unit.recipes.test_registry import forget

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "own_recipe"

CONFIG = """\
model: ratings
data: {path: train.csv, held_out_path: held_out.csv}
table: {dim: 8}
train: {epochs: 8}
optimizer: {name: adam, lr: 0.1}
log: {every_steps: 5, tensorboard: false}
checkpoint: {every_steps: 10, mode: sync, keep_last: null}
run: {path: run, device: cpu}
"""


@dataclass
class Ratings:
    """A folder with ratings, and the package installed beside it."""

    folder: Path
    site: Path

    def train(self, *arguments: str) -> str:
        """Trains on 2 ranks; returns what is printed."""
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "embedtrain"]
        done = subprocess.run(
            [sys.executable, *torchrun, "train", "config.yaml", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": f"{self.site}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    def records(self, run: str, metric: str) -> list[float]:
        lines = (self.folder / run / "metrics.jsonl").read_text().splitlines()
        return [record[metric] for record in map(json.loads, lines) if metric in record]

    def tensors(self, run: str) -> dict[str, torch.Tensor]:
        path = latest_checkpoint(str(self.folder / run / "checkpoints"))
        assert path is not None
        with CheckpointReader(path) as reader:
            return {name: reader.read(name, 0, info.shape[0]) for name, info in reader.tensors.items()}


@pytest.fixture(scope="module")
def ratings(tmp_path_factory: pytest.TempPathFactory) -> Ratings:
    """Installs the package and trains a whole run on 2 ranks: users of a group rate the items of their group high."""
    folder, site = tmp_path_factory.mktemp("ratings"), tmp_path_factory.mktemp("site")
    source = shutil.copytree(EXAMPLE, tmp_path_factory.mktemp("source") / "own_recipe")  # building writes into it
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", *offline, str(source)]
    installed = subprocess.run(pip, capture_output=True, text=True, timeout=120)
    assert installed.returncode == 0, installed.stderr
    draw = random.Random(0)
    lines = [f"{u},{i},{5 if u % 3 == i % 3 else 1}\n" for u in range(90) for i in range(60) if draw.random() < 0.5]
    draw.shuffle(lines)
    (folder / "held_out.csv").write_text("".join(lines[:300]))
    (folder / "train.csv").write_text("".join(lines[300:]))
    (folder / "config.yaml").write_text(CONFIG)
    found = Ratings(folder, site)
    printed = found.train()
    assert "starting: " in printed
    return found


Run = Callable[..., str]


@pytest.fixture
def run(ratings: Ratings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command in this process, with the package where it is found; returns what it prints."""
    monkeypatch.syspath_prepend(ratings.site)
    monkeypatch.chdir(ratings.folder)
    forget()

    def run_one(*arguments: str) -> str:
        status = cli.main(arguments)
        captured = capfd.readouterr()
        assert status == 0, captured.err
        return captured.out

    yield run_one
    monkeypatch.undo()
    sys.modules.pop("ratings_recipe", None)
    forget()


def test_the_example_is_short() -> None:
    assert len((EXAMPLE / "ratings_recipe.py").read_text().splitlines()) <= 80


def test_it_learns_and_is_evaluated_in_the_loop_and_by_evaluate(ratings: Ratings, run: Run) -> None:
    errors = ratings.records("run", "rmse")
    assert len(errors) == 8
    assert errors[-1] < 0.5 * errors[0]
    value, name = run("evaluate", "run").split()
    assert (name, float(value)) == ("rmse", pytest.approx(errors[-1], abs=1e-3))


@pytest.mark.slow
def test_it_resumes_to_the_last_bit(ratings: Ratings) -> None:
    shutil.copytree(ratings.folder / "run", ratings.folder / "resumed")
    checkpoints = sorted((ratings.folder / "resumed" / "checkpoints").iterdir())
    for path in checkpoints[len(checkpoints) // 2 :]:
        shutil.rmtree(path)
    step = int(checkpoints[len(checkpoints) // 2 - 1].name.removeprefix("step-"))
    assert 0 < step < int(checkpoints[-1].name.removeprefix("step-"))
    assert f"resuming at step {step} " in ratings.train("run.path=resumed")
    whole, resumed = ratings.tensors("run"), ratings.tensors("resumed")
    states = ("weight", "exp_avg", "exp_avg_sq")
    assert whole.keys() == resumed.keys() == {f"{table}/{state}" for table in ("user", "item") for state in states}
    for name, tensor in whole.items():
        assert torch.equal(tensor, resumed[name]), name


def test_it_is_reported_planned_and_tried(ratings: Ratings, run: Run) -> None:
    run("report", "run", "--output", "report.html")
    assert "RMSE" in (ratings.folder / "report.html").read_text()

    planned = run("plan", "config.yaml", "run.path=none", "--rows", "user=1e6", "--rows", "item=1000")
    rows = {line.split()[0]: line.split()[1] for line in planned.splitlines() if line.startswith(("user", "item"))}
    assert rows == {"user": "1,000,000", "item": "1,000"}

    tried = run("train", "config.yaml", "run.path=untouched", "--dry-run")
    assert "step 2 " in tried
    assert "epochs       8 of" in tried
    assert not (ratings.folder / "untouched").exists()


def test_its_rows_are_exported_under_their_numbers(ratings: Ratings, run: Run) -> None:
    run("export", "run", "--table", "item", "--format", "word2vec", "--output", "items.txt")
    first, *lines = (ratings.folder / "items.txt").read_text().splitlines()
    assert first == "60 8"
    assert [line.split()[0] for line in lines] == [str(row) for row in range(60)]
