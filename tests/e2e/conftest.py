from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import psutil
import pytest

from tests import launching
from tests.launching import Process

NUM_TOPICS = 4


@dataclass
class Job:
    """How to start embedtrain as a user does, in a folder of the test's own."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    is_warm: bool | None = None

    @property
    def text_path(self) -> Path:
        return self.folder / "corpus.txt"

    def command(self, *arguments: str, ranks: int | None = None, torchrun: tuple[str, ...] = ()) -> list[str]:
        return [*launching.torchrun(ranks, *torchrun), "-m", "embedtrain", *arguments]

    def start(
        self,
        *arguments: str,
        ranks: int | None = None,
        torchrun: tuple[str, ...] = (),
        stdin: IO[Any] | None = None,
        is_warm: bool | None = None,
    ) -> Process:
        """Starts a command of embedtrain, under torchrun if `ranks` is a number.

        Args:
            torchrun: further options of torchrun.
            stdin: what the command reads; nothing by default.
            is_warm: see `launching.start`; None for what the job or else the session has chosen.
        """
        is_warm = self.is_warm if is_warm is None else is_warm
        command = self.command(*arguments, ranks=ranks, torchrun=torchrun)
        return launching.start(command, cwd=self.folder, environment=self.environment, stdin=stdin, is_warm=is_warm)

    def run(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return launching.finish(self.start(*arguments, **options))

    def run_script(
        self, path: str, ranks: int | None = None, is_warm: bool | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [*launching.torchrun(ranks), path]
        return launching.run(command, cwd=self.folder, environment=self.environment, is_warm=is_warm)

    def train_arguments(self, run: str, *overrides: str) -> list[str]:
        return [
            "train",
            "config.yaml",
            f"data.path={self.text_path}",
            f"data.cache_path={self.folder / 'cache'}",
            f"run.path={run}",
            *overrides,
        ]

    def vectors(self, run: str) -> np.ndarray:
        """The vectors of a run, through the export that users have."""
        output = self.folder / f"{run}.npy"
        done = self.run("export", run, "--format", "npy", "--output", str(output))
        assert done.returncode == 0, done.stderr
        return np.load(output)


def make_job(folder: Path, environment: Mapping[str, str] | None = None) -> Job:
    """Writes a configuration and a small text of a few topics: the words of a topic stand near each other."""
    generator = np.random.default_rng(7)
    letters = "bcdfghjklmnpqrst"
    words = [[f"{a}{t}{b}" for a in letters for b in "aeiou"] for t in "xzvw"[:NUM_TOPICS]]
    lines = []
    for _ in range(4000):
        topic = words[generator.integers(NUM_TOPICS)]
        picked = (generator.random(generator.integers(4, 15)) ** 2 * len(topic)).astype(int)
        lines.append(" ".join(topic[i] for i in picked))
    (folder / "corpus.txt").write_text("\n".join(lines))
    (folder / "config.yaml").write_text(
        "table: {dim: 16}\n"
        "train: {epochs: 3, words_per_step: 256, block_words: 64}\n"
        "word2vec: {sample: 0}\n"
        "log: {every_steps: 20, tensorboard: false}\n"
    )
    return Job(folder, environment or {})


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path)


@pytest.fixture
def cold_job(job: Job) -> Job:
    """A job whose commands start exactly as a user's do."""
    return replace(job, is_warm=False)


Wait = Callable[[Callable[[], object], Process], None]


@pytest.fixture
def wait_until() -> Wait:
    def wait(condition: Callable[[], object], process: Process) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, f"waited a minute for the run to get there: {process.errors()}"
            time.sleep(0.01)

    return wait


def ranks_of(launcher: Process) -> list[psutil.Process]:
    """Returns the ranks of a launcher in their order, which is that in which it starts them."""
    return sorted(psutil.Process(launcher.pid).children(), key=lambda process: process.pid)
