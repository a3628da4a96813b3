"""Asked to stop by any signal, on any rank, in any way: all ranks save at the same step and say so."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest

from tests.e2e.conftest import Job

Wait = Callable[[Callable[[], object], subprocess.Popen[str]], None]

ENDLESS = ("train.epochs=2000", "checkpoint.every_steps=40", "checkpoint.keep_last=2")
BOUND_SECONDS = 20
"""Eight steps and a save take far less; a busy machine takes more."""


def has_checkpoint(job: Job, run: str) -> bool:
    return any((job.folder / run / "checkpoints").glob("step-*/manifest.json"))


def rank_process(launcher: subprocess.Popen[str], rank: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if child.environ().get("RANK") == str(rank))


def saved_status(job: Job, run: str) -> dict:
    """The status of a run that was stopped, whose newest checkpoint is that of the step at which it stopped."""
    status = json.loads((job.folder / run / "status.json").read_text())
    assert (status["state"], status["exit_status"]) == ("preempted", 75)
    newest = max((job.folder / run / "checkpoints").glob("step-*/manifest.json"))
    assert newest.parent.name == f"step-{status['step']:09d}"
    return status


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGINT, 0), (signal.SIGUSR1, 1)], ids=["TERM", "INT", "USR1"]
)
def test_a_signal_to_one_rank_stops_all(job: Job, wait_until: Wait, number: signal.Signals, rank: int) -> None:
    launcher = job.start(*job.train_arguments("run", *ENDLESS), ranks=2)
    wait_until(lambda: has_checkpoint(job, "run"), launcher)
    rank_process(launcher, rank).send_signal(number)
    began = time.monotonic()
    _, errors = launcher.communicate(timeout=60)
    assert time.monotonic() - began < BOUND_SECONDS
    saved_status(job, "run")
    assert "exitcode  : 75" in errors


def test_slurms_warning_is_passed_on_by_torchrun(job: Job, wait_until: Wait) -> None:
    forward = ("--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1")
    launcher = job.start(*job.train_arguments("run", *ENDLESS), ranks=2, torchrun=forward)
    wait_until(lambda: has_checkpoint(job, "run"), launcher)
    launcher.send_signal(signal.SIGUSR1)
    launcher.communicate(timeout=60)
    saved_status(job, "run")


def test_a_second_interrupt_leaves_at_once(job: Job) -> None:
    # A step so long that the first interrupt is not heard before the second comes.
    slow = ("train.words_per_step=32768", "table.dim=1024", "word2vec.negatives=50")
    process = job.start(*job.train_arguments("run", *ENDLESS, *slow))
    assert process.stderr is not None
    assert any(line.startswith("starting") for line in process.stderr)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(2.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in (128 + signal.SIGINT, 75)
    assert time.monotonic() - began < 10
    if process.returncode != 75:
        assert not has_checkpoint(job, "run")
