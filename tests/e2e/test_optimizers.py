"""Choosing, resetting and comparing optimizers from the command line."""

from __future__ import annotations

import json

import pytest

from tests.e2e.conftest import Job


def records(job: Job, run: str) -> list[dict]:
    return [json.loads(line) for line in (job.folder / run / "metrics.jsonl").read_text().splitlines()]


def test_another_optimizer_trains_is_saved_and_resumed_by_the_same_command(job: Job) -> None:
    arguments = job.train_arguments("run", "train.epochs=4", "optimizer.name=adam", "optimizer.lr=0.01")
    done = job.run(*arguments, ranks=2)
    assert done.returncode == 0, done.stderr
    losses = [record["loss"] for record in records(job, "run")]
    assert losses[-1] < losses[0]
    shown = job.run("inspect", "run").stdout
    assert "input/exp_avg_sq" in shown
    assert "Adam" in shown
    assert job.run(*arguments).returncode == 0
    other = job.run(*[a.replace("name=adam", "name=rmsprop") for a in arguments])
    assert other.returncode == 2
    assert "optimizer.name (was adam, is rmsprop)" in other.stderr


def test_the_state_starts_anew_at_a_step_and_not_at_one_that_is_past(job: Job) -> None:
    arguments = job.train_arguments("run", "train.epochs=2")
    assert job.run(*arguments).returncode == 0
    last = records(job, "run")[-1]["step"]
    late = job.run(*arguments, f"optimizer.reset_state_from_step={last - 1}")
    assert late.returncode == 2
    assert f"is at step {last} already" in late.stderr
    plain = job.run(*job.train_arguments("plain", "train.epochs=4"))
    reset = job.run(*job.train_arguments("reset", "train.epochs=4", f"optimizer.reset_state_from_step={last}"))
    assert plain.returncode == reset.returncode == 0, reset.stderr
    assert (job.vectors("plain") != job.vectors("reset")).any()


def test_compare_trains_all_and_draws(job: Job) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["compare", *job.train_arguments("unused", "train.epochs=2")[1:]]
    arguments = [a for a in arguments if not a.startswith("run.path")]
    rates = ["--rates", "sgd=0.001,1e30", "--rates", "rowwise_adagrad=0.1,0.3"]
    done = job.run(*arguments, "--optimizers", "rowwise_adagrad,sgd", *rates, "--output", "out")
    assert done.returncode == 0, done.stderr
    assert "| sgd | 0.001, 1e+30 | 0.001 (at the edge of its grid) |" in done.stdout
    assert {path.name for path in (job.folder / "out").iterdir()} >= {
        "comparison.md",
        "comparison.csv",
        "comparison.png",
    }
