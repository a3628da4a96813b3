from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np
import pytest

NUM_TOPICS = 4


@dataclass
class Job:
    """How to start embedtrain as a user does, in a folder of the test's own."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def text_path(self) -> Path:
        return self.folder / "corpus.txt"

    def command(self, *arguments: str, ranks: int | None = None, torchrun: tuple[str, ...] = ()) -> list[str]:
        return self._python("-m", "embedtrain", *arguments, ranks=ranks, torchrun=torchrun)

    def start(self, *arguments: str, stdin: TextIO | None = None, **options: object) -> subprocess.Popen[str]:
        return self._start(self.command(*arguments, **options), stdin)

    def run(self, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
        return self.finish(self.start(*arguments, **options))

    def run_script(self, path: str, ranks: int) -> subprocess.CompletedProcess[str]:
        return self.finish(self._start(self._python(path, ranks=ranks)))

    def _python(self, *arguments: str, ranks: int | None, torchrun: tuple[str, ...] = ()) -> list[str]:
        launcher = [sys.executable]
        if ranks is not None:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *torchrun]
        return [*launcher, *arguments]

    def _start(self, command: list[str], stdin: TextIO | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={
                **os.environ,
                **self.environment,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(Path(__file__).parents[2]),
            },
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

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
def wait_until() -> Callable[[Callable[[], object], subprocess.Popen[str]], None]:
    import time

    def wait(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "waited a minute for the run to get there"
            time.sleep(0.01)

    return wait
