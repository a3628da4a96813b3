"""Killed at any moment, a run goes on from its last checkpoint and ends where it would have ended."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import psutil
import pytest

from tests.e2e.conftest import Job, Wait, make_job, ranks_of
from tests.records import contents, without_costs

LONG = ("train.epochs=6", "checkpoint.every_steps=40", "checkpoint.keep_last=2")


def num_checkpoints(job: Job, run: str) -> int:
    return len(list((job.folder / run / "checkpoints").glob("step-*/manifest.json")))


def metrics(job: Job, run: str) -> list[dict]:
    return [json.loads(line) for line in (job.folder / run / "metrics.jsonl").read_text().splitlines()]


def learned(job: Job, run: str) -> list[dict]:
    return [without_costs(record) for record in metrics(job, run)]


@dataclass(frozen=True)
class Whole:
    """What an uninterrupted run has learned."""

    vectors: np.ndarray
    learned: list[dict]


@pytest.fixture(scope="module")
def whole_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], Whole]:
    """Returns a function that trains without an interruption on a number of ranks, once per module."""

    @functools.cache
    def train(ranks: int | None) -> Whole:
        job = make_job(tmp_path_factory.mktemp("whole"))
        # Saved in the foreground and in full: that the others save otherwise must not show.
        done = job.run(*job.train_arguments("whole", "train.epochs=6", "checkpoint.mode=sync"), ranks=ranks)
        assert done.returncode == 0, done.stderr
        return Whole(job.vectors("whole"), learned(job, "whole"))

    return train


WholeOn = Callable[[int | None], Whole]


@pytest.mark.parametrize(
    "victims", [(1,), pytest.param((1, 0), marks=pytest.mark.slow)], ids=["rank 1", "rank 1, then rank 0"]
)
def test_a_rank_killed_in_mid_run_costs_nothing_but_time(
    job: Job, wait_until: Wait, whole_on: WholeOn, victims: tuple[int, ...]
) -> None:
    command = job.train_arguments("killed", *LONG)
    before = 0
    for victim in victims:
        launcher = job.start(*command, ranks=2)
        wait_until(lambda: num_checkpoints(job, "killed") >= 2, launcher)
        wait_until(lambda at=before: metrics(job, "killed")[-1]["step"] > at, launcher)
        ranks_of(launcher)[victim].send_signal(signal.SIGKILL)
        launcher.communicate(timeout=60)
        assert launcher.returncode != 0
        before = metrics(job, "killed")[-1]["step"]

    resumed = job.run(*command, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    np.testing.assert_array_equal(job.vectors("killed"), whole_on(2).vectors)
    assert learned(job, "killed") == whole_on(2).learned


@pytest.mark.slow
def test_a_run_killed_among_deltas_ends_where_it_would_have(job: Job, wait_until: Wait, whole_on: WholeOn) -> None:
    deltas = ("train.epochs=6", "checkpoint.every_steps=20", "checkpoint.keep_last=1", "checkpoint.full_every=4")
    launcher = job.start(*job.train_arguments("killed", *deltas), ranks=2)
    wait_until(lambda: num_checkpoints(job, "killed") >= 3, launcher)
    ranks_of(launcher)[1].send_signal(signal.SIGKILL)
    launcher.communicate(timeout=60)
    resumed = job.run(*job.train_arguments("killed", *deltas), ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step" in resumed.stderr
    np.testing.assert_array_equal(job.vectors("killed"), whole_on(2).vectors)
    assert job.run("inspect", "killed", "--verify").returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_asked_to_stop_saves_and_says_so(
    job: Job, wait_until: Wait, whole_on: WholeOn, number: signal.Signals
) -> None:
    command = job.train_arguments("stopped", *LONG)
    process = job.start(*command)
    wait_until(lambda: num_checkpoints(job, "stopped") >= 1, process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    status = json.loads((job.folder / "stopped" / "status.json").read_text())
    assert (status["state"], status["exit_status"]) == ("preempted", 75)
    assert f"stopped and saved at step {status['step']:,}" in errors
    assert job.run(*command).returncode == 0
    assert json.loads((job.folder / "stopped" / "status.json").read_text())["state"] == "done"
    np.testing.assert_array_equal(job.vectors("stopped"), whole_on(None).vectors)


def test_sigterm_to_torchrun_saves_on_all_ranks(cold_job: Job, wait_until: Wait) -> None:
    job = cold_job
    launcher = job.start(*job.train_arguments("stopped", *LONG), ranks=2)
    wait_until(lambda: num_checkpoints(job, "stopped") >= 1, launcher)
    ranks = ranks_of(launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=60)
    status = json.loads((job.folder / "stopped" / "status.json").read_text())
    assert (status["state"], status["exit_status"]) == ("preempted", 75)
    assert not any(rank.is_running() for rank in ranks)


def test_ranks_die_with_a_killed_launcher(job: Job, wait_until: Wait) -> None:
    launcher = job.start(*job.train_arguments("orphaned", *LONG), ranks=2)
    wait_until(lambda: num_checkpoints(job, "orphaned") >= 1, launcher)
    ranks = ranks_of(launcher)
    launcher.kill()
    launcher.communicate(timeout=60)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


@pytest.mark.slow
def test_torchruns_restarts_resume_by_themselves(job: Job, wait_until: Wait, whole_on: WholeOn) -> None:
    launcher = job.start(*job.train_arguments("restarted", *LONG), ranks=2, torchrun=("--max-restarts", "1"))
    wait_until(lambda: num_checkpoints(job, "restarted") >= 2, launcher)
    ranks_of(launcher)[0].send_signal(signal.SIGKILL)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, errors
    assert "resuming at step" in errors
    np.testing.assert_array_equal(job.vectors("restarted"), whole_on(2).vectors)


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_with_the_same_words(job: Job, wait_until: Wait, whole_on: WholeOn) -> None:
    process = job.start(*job.train_arguments("moved", *LONG))
    wait_until(lambda: num_checkpoints(job, "moved") >= 2, process)
    process.kill()
    process.communicate()
    resumed = job.run(*job.train_arguments("moved", *LONG), ranks=3)
    assert resumed.returncode == 0, resumed.stderr
    # The order of float32 sums differs, and training carries the difference on.
    np.testing.assert_allclose(job.vectors("moved"), whole_on(None).vectors, rtol=1e-2, atol=1e-3)


def test_a_complete_run_is_left_as_it_is_and_refused_to_other_settings_and_another_text(job: Job) -> None:
    train = job.train_arguments("run", "train.epochs=1")
    assert job.run(*train).returncode == 0
    before = contents(job.folder / "run" / "checkpoints")
    again = job.run(*train)
    assert again.returncode == 0
    assert "done at step" in again.stderr

    refused = job.run(*train, "optimizer.lr=0.75", "table.dim=8")
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "optimizer.lr (was 0.7, is 0.75)" in line
    assert "table.dim (was 16, is 8)" in line

    with job.text_path.open("a") as file:
        file.write("\nsome more words" * 10)
    refused = job.run(*train)
    assert refused.returncode == 2
    assert "was trained on other data" in refused.stderr.splitlines()[-1]
    assert "Traceback" not in refused.stderr
    assert contents(job.folder / "run" / "checkpoints") == before
