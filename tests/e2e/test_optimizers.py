"""Choosing, resetting and comparing optimizers from the command line."""

from __future__ import annotations

import json
import signal

import numpy as np
import pytest

from embedtrain.checkpoint import CheckpointReader, find_checkpoints
from tests.e2e.conftest import Job, Wait


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


@pytest.mark.slow
def test_word_tables_of_two_optimizers_train_as_those_of_one(job: Job) -> None:
    # A bound that no row comes near parts the tables and changes nothing else.
    apart = job.run(*job.train_arguments("apart", "optimizer.tables.output.max_norm=1.0e+6"), ranks=2)
    together = job.run(*job.train_arguments("together"), ranks=2)
    assert apart.returncode == together.returncode == 0, apart.stderr
    np.testing.assert_allclose(job.vectors("apart"), job.vectors("together"), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_state_starts_anew_in_a_run_under_way(job: Job, wait_until: Wait) -> None:
    arguments = job.train_arguments("run", "train.epochs=40", "checkpoint.every_steps=10", "checkpoint.keep_last=null")
    started = job.start(*arguments)
    wait_until(lambda: list((job.folder / "run" / "checkpoints").glob("step-*/manifest.json")), started)
    started.send_signal(signal.SIGTERM)
    started.communicate(timeout=60)
    stopped_at = find_checkpoints(str(job.folder / "run" / "checkpoints"))[-1].step
    reset_at = stopped_at + 5
    done = job.run(*arguments, f"optimizer.reset_state_from_step={reset_at}")
    assert done.returncode == 0, done.stderr
    for checkpoint in find_checkpoints(str(job.folder / "run" / "checkpoints")):
        with CheckpointReader(checkpoint.path) as reader:
            # The optimizer counts its steps from where its state began.
            (settings,) = reader.state["optimizer"]["param_groups"]
            begun = reset_at if checkpoint.step > reset_at else 0
            assert settings["step"] == checkpoint.step - begun


def test_tensorboard_shows_what_is_left_of_the_rates(job: Job) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["log.tensorboard=true", "log.rows_every_steps=20", "train.epochs=1"]
    own = ["optimizer.tables.output={name: adam, lr: 0.01}"]
    done = job.run(*job.train_arguments("run", *options, *own), ranks=2)
    assert done.returncode == 0, done.stderr
    board = EventAccumulator(str(job.folder / "run" / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    deciles = ["decile 1, hot", *(f"decile {n}" for n in range(2, 10)), "decile 10, rare"]
    assert set(board.Tags()["histograms"]) == {f"effective_rate_{t}/{d}" for t in ("input", "output") for d in deciles}
    num_words = len((job.folder / "run" / "vocabulary.tsv").read_text().splitlines())
    for table in ("input", "output"):
        last = [board.Histograms(f"effective_rate_{table}/{decile}")[-1].histogram_value for decile in deciles]
        assert sum(histogram.num for histogram in last) == num_words
        untouched = [event.value for event in board.Scalars(f"never_touched/{table}")]
        assert 0 <= untouched[-1] <= untouched[0] < 1
    grown = [event.value for event in board.Scalars("state_mean/input")]
    assert grown == sorted(grown)
    assert grown[-1] > 100.0  # its first value
    hot, rare = (board.Histograms(f"effective_rate_input/{deciles[place]}")[-1].histogram_value for place in (0, -1))
    assert hot.sum / hot.num < rare.sum / rare.num


@pytest.mark.slow
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
