"""What a user reads when a run fails: the rank to blame, its host, the cause, and where every rank was."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import Job
from tests.records import contents

SCRIPT = """
import os
import sys
import time

from embedtrain.cli import main
from embedtrain.data.skipgram import TextBatches
from embedtrain.distributed.launcher import leave

batch = TextBatches.batch


def struck(self, epoch, step):
    if os.environ["RANK"] == "1" and step == 4:
        {fault}
    return batch(self, epoch, step)


TextBatches.batch = struck
leave(main({arguments!r}))
"""


def run_struck(job: Job, fault: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Trains on two ranks, of which one meets a fault when it samples its fifth step."""
    (job.folder / "struck.py").write_text(
        SCRIPT.format(fault=fault, arguments=job.train_arguments("run", "log.every_steps=1000", *overrides))
    )
    return job.run_script("struck.py", ranks=2)


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("embedtrain: ")]


def test_a_failed_ranks_own_error_comes_first_and_torchrun_repeats_it(job: Job) -> None:
    done = run_struck(job, "raise OSError('no such luck')")
    cause = f"rank 1 on {socket.gethostname()} failed in step 5, sample: OSError: no such luck"
    assert said(done)[0] == f"embedtrain: {cause}"
    assert f"embedtrain: failed: {cause}" in said(done)
    root_cause = done.stderr.partition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", root_cause) and cause in root_cause
    status = json.loads((job.folder / "run" / "status.json").read_text())
    assert status["error"] == cause


def test_a_rank_that_hangs_is_named_with_where_each_rank_was(job: Job) -> None:
    done = run_struck(job, "time.sleep(1000)", "run.timeout_seconds=4")
    (line,) = [line for line in said(done) if "did not take part" in line]
    host = socket.gethostname()
    assert line.startswith("embedtrain: failed: rank 1 did not take part in step 5 and does not answer")
    assert re.search(rf"Last seen: rank 0 on {host} in step 5, [a-z> ]+; rank 1 on {host} in step 5, sample$", line)


ALONE = """
import os

from embedtrain.cli import main
from embedtrain.distributed.launcher import leave

leave(main(["train", "missing.yaml"] if os.environ["RANK"] == "{rank}" else {arguments!r}))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_that_one_rank_alone_finds_before_they_join_is_told(job: Job, rank: int) -> None:
    (job.folder / "alone.py").write_text(ALONE.format(rank=rank, arguments=job.train_arguments("run")))
    done = job.run_script("alone.py", ranks=2)
    (line,) = said(done)
    assert line.startswith("embedtrain: error: ") and "missing.yaml" in line
    assert line.endswith(f" (rank 1 on {socket.gethostname()})") == (rank == 1)
    root_cause = done.stderr.partition("Root Cause")[2]
    assert re.search(rf"rank +: {rank} ", root_cause) and "no configuration file missing.yaml" in root_cause


def test_a_dry_run_under_torchrun_writes_nothing(job: Job) -> None:
    done = job.run(*job.train_arguments("run", "--dry-run"), ranks=2)
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout and done.stdout.count("step 2  ") == 1
    assert not (job.folder / "run").exists()
    assert job.run(*job.train_arguments("run", "train.epochs=1")).returncode == 0
    before = contents(job.folder / "run")
    done = job.run(*job.train_arguments("run", "train.epochs=1", "--dry-run"), ranks=2)
    assert "would resume" in done.stdout
    assert contents(job.folder / "run") == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", path], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("needs the program mount")
    if mounted.returncode != 0:
        pytest.skip(f"may not mount a disk of its own: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_that_is_too_small_is_found_before_the_start(job: Job, small_disk: Path) -> None:
    done = job.run(*job.train_arguments(str(small_disk / "run")))
    assert done.returncode == 2, done.stderr
    (line,) = said(done)
    assert re.search(r"the disk of run.path=\S+ needs 170.00 KiB of free space for 4 checkpoints", line)
    assert "checkpoint.keep_last" in line
    assert not (small_disk / "run" / "checkpoints").exists()


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """Has processes started from here on heed SIGINT, also where these tests run in the background of a script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_an_interrupted_command_leaves_without_a_traceback(job: Job) -> None:
    os.mkfifo(job.folder / "waits.yaml")
    process = job.start("config", "show", "waits.yaml")
    # The command has begun to read once the other end can be opened. A signal just before its read does not end that
    # read, the end of the file does.
    with (job.folder / "waits.yaml").open("w"):
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert errors == "reading the configuration from the pipe waits.yaml until it is closed\nembedtrain: interrupted\n"
