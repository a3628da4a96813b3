"""Asked to stop by any signal, on any rank, in any way: all ranks save at the same step and say so."""

from __future__ import annotations

import json
import signal
import time

import pytest

from tests.e2e.conftest import Job, Wait, ranks_of

pytestmark = pytest.mark.serial

ENDLESS = ("train.epochs=2000", "checkpoint.every_steps=40", "checkpoint.keep_last=2")
BOUND_SECONDS = 20
"""Eight steps and a save take far less; a busy machine takes more."""


def has_checkpoint(job: Job, run: str) -> bool:
    return any((job.folder / run / "checkpoints").glob("step-*/manifest.json"))


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
    ranks_of(launcher)[rank].send_signal(number)
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


def test_a_second_interrupt_leaves_at_once(job: Job, wait_until: Wait) -> None:
    # Steps so long that the run is not saved before the second interrupt comes.
    slow = ("train.words_per_step=32768", "table.dim=1024", "word2vec.negatives=50")
    process = job.start(*job.train_arguments("run", *ENDLESS, *slow))
    wait_until(lambda: "\nstarting" in process.errors(), process)
    # Until one is heard more than two seconds after the first: when that is depends on how busy the machine is.
    give_up = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < give_up:
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    assert process.poll() == 128 + signal.SIGINT
    assert not has_checkpoint(job, "run")
