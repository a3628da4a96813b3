"""Whatever lies in the files that commands read: a sentence or a result, soon, and nothing written elsewhere."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedtrain.train import lock
from tests.unit.commands.fuzz import call
from tests.unit.commands.fuzz_files import CONFIGS, damage_bytes, damage_file, damage_manifest, write_data

SEED = 17
MAX_SECONDS = 10.0

READING = {
    "words": [
        ["inspect", "words", "--verify"],
        ["inspect", "words"],
        ["diff", "words", "words/checkpoints/step-000000005", "--top", "3"],
        ["neighbors", "words", "aa", "-", "bb", "+", "cc", "--top", "3"],
        ["evaluate", "words", "--similarity", "similar.tsv", "--analogies", "analogies.txt"],
        ["export", "words", "--format", "npy", "--output", "out.npy", "--overwrite"],
        ["export", "words", "--format", "word2vec-text", "--output", "out.txt", "--overwrite"],
        ["report", "words", "--output", "page.html"],
        ["grow", "words", "grown", "data.path=more.txt"],
    ],
    "pairs": [
        ["inspect", "pairs", "--verify"],
        ["recommend", "pairs", "u1", "--top", "2"],
        ["neighbors", "pairs", "i1", "--top", "2"],
        ["evaluate", "pairs"],
        ["report", "pairs", "--output", "page.html"],
    ],
    "clicks": [
        ["inspect", "clicks", "--verify"],
        ["evaluate", "clicks"],
        ["diff", "clicks", "clicks/checkpoints/step-000000005"],
        ["report", "clicks", "--output", "page.html"],
    ],
}
OWNER = {
    "host": "elsewhere/1",
    "pid": 1,
    "started": "1",
    "job": "",
    "since": "2026-01-01T00:00:00+00:00",
    "beat_seconds": 1.0,
    "beat": 3,
    "token": "0",
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of each model, their data, and a file that nobody may write."""
    # Prepared data are named by the paths of their sources: it is made in the place where it is used.
    folder = tmp_path_factory.mktemp("fuzz") / "here"
    folder.mkdir()
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in CONFIGS:
            outcome = call(["train", f"{name}.yaml"])
            assert outcome.status == 0, outcome.printed
    shutil.copytree(folder, folder.parent / "kept")
    return folder.parent / "kept"


@pytest.fixture
def here(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, the current one."""
    folder = kept.parent / "here"
    _restore(folder, kept)
    monkeypatch.chdir(folder)
    # A job elsewhere that may live is watched for a minute; here for one look.
    monkeypatch.setattr(lock, "STALE_BEATS", 0)
    return folder


def _restore(folder: Path, kept: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    # With the times of the files, which prepared data are named by.
    shutil.copytree(kept, folder)


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def strike(number: int, frame: object) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def damage(here: Path, generator: random.Random) -> tuple[str, list[str]]:
    """Damages a file; returns what was done, and a command that reads it."""
    model = generator.choice(["words", "words", "words", "pairs", "clicks"])
    train = ["train", f"{model}.yaml"]
    run, secret = here / model, here / "secret"
    kind = generator.choice(["manifest", "manifest", "cache", "own", "owner", "evaluation"])
    if kind == "manifest":
        return damage_manifest(run, generator), generator.choice([*READING[model], train])
    if kind == "cache":
        files = sorted(path for path in (here / "cache").rglob("*") if path.is_file())
        return damage_file(generator.choice(files), secret, generator), train
    if kind == "own":
        files = sorted(path for path in run.iterdir() if path.is_file())
        return damage_file(generator.choice(files), secret, generator), generator.choice([*READING[model], train])
    if kind == "owner":
        path = run / "owner-00000001.json"
        path.write_text(json.dumps(OWNER))
        return damage_file(path, secret, generator), train
    path = here / generator.choice(["similar.tsv", "analogies.txt"])
    return damage_bytes(path, generator), READING["words"][4]


def test_whatever_lies_in_the_files(here: Path, kept: Path, runs_all: bool) -> None:
    outside = sorted(path.name for path in here.parent.iterdir())
    for number in range(2000 if runs_all else 100):
        generator = random.Random(SEED * 1_000_000 + number)
        done, arguments = damage(here, generator)
        began = time.monotonic()
        try:
            with at_most(MAX_SECONDS):
                outcome = call(arguments)
        except TimeoutError as error:
            raise AssertionError(f"{number}: {done}: {arguments}: {error}") from error
        said = f"{number}: {done}: {arguments} in {time.monotonic() - began:.1f} s\n{outcome.printed[-3000:]}"
        if outcome.error is not None:
            raise AssertionError(said) from outcome.error
        assert outcome.status in (0, 1, 2), said
        assert "Traceback" not in outcome.printed, said
        assert "\x1b" not in outcome.printed, said
        assert outcome.status == 0 or "embedtrain: " in outcome.printed, said
        assert (here / "secret").read_text() == "secret\n", said
        assert sorted(path.name for path in here.parent.iterdir()) == outside, said
        _restore(here, kept)
