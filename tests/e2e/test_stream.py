"""Ranking on a stream from the command line: each example once, stopped anywhere and gone on with at the next one."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from embedtrain.checkpoint import CheckpointReader, find_checkpoints, latest_checkpoint
from tests import launching
from tests.e2e.conftest import Job, Wait
from tests.e2e.test_ranking import metrics, tensors, write_clicks

STEP_LINES, NUM_LINES = 64, 1500


@pytest.fixture
def clicks(tmp_path: Path) -> Job:
    write_clicks(tmp_path / "clicks.csv", NUM_LINES, seed=1)
    write_clicks(tmp_path / "valid.csv", 400, seed=2)
    for name in ("clicks.csv", "valid.csv"):  # columns are named by the configuration
        path = tmp_path / name
        path.write_text(path.read_text().partition("\n")[2])
    (tmp_path / "config.yaml").write_text(
        "model: ranking\n"
        "data:\n"
        "  columns: [label, x0, x1, user, shop, tags]\n"
        "  dense: [x0, x1]\n"
        "  dense_transform: none\n"
        "  categorical: [user, shop, tags]\n"
        "  num_rows: 100\n"
        "  features: {tags: {bag: true, pooling: sum}}\n"
        "  valid_path: valid.csv\n"
        "  cache_path: cache\n"
        "table: {dim: 8}\n"
        "ranking: {top: [16]}\n"
        f"train: {{epochs: 1, global_batch_size: {STEP_LINES}}}\n"
        "schedule: {name: constant}\n"
        "dense_optimizer: {lr: 0.01}\n"
        "checkpoint: {every_steps: 5, keep_last: null}\n"
        "log: {every_steps: 5, tensorboard: false}\n"
    )
    return Job(tmp_path)


def lines_of(job: Job) -> list[str]:
    return (job.folder / "clicks.csv").read_text().splitlines(keepends=True)


def arguments(run: str, *overrides: str, path: str = "-") -> list[str]:
    return ["train", "config.yaml", f"data.path={path}", f"run.path={run}", *overrides]


def feed(job: Job, text: str, *command: str, ranks: int | None = None) -> subprocess.CompletedProcess[str]:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream, os.fdopen(reader) as source:
        process = job.start(*command, ranks=ranks, stdin=source)
        source.close()
        stream.write(text)
        stream.close()
        return launching.finish(process)


def steps_of(job: Job, run: str) -> list[int]:
    return [checkpoint.step for checkpoint in find_checkpoints(str(job.folder / run / "checkpoints"))]


def saved_stream(job: Job, run: str) -> dict:
    path = latest_checkpoint(str(job.folder / run / "checkpoints"))
    assert path is not None
    with CheckpointReader(path) as reader:
        return dict(reader.state["train"])


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_run_stopped_while_it_waits_goes_on_at_the_next_example_bit_for_bit(
    clicks: Job, wait_until: Wait, ranks: int | None
) -> None:
    lines = lines_of(clicks)
    whole = feed(clicks, "".join(lines), *arguments("whole"), ranks=ranks)
    assert whole.returncode == 0, whole.stderr
    state = saved_stream(clicks, "whole")
    assert (state["examples"], state["stream"]["line"]) == (NUM_LINES, NUM_LINES)
    final = metrics(clicks, "whole")[-1]
    assert final["step"] == -(-NUM_LINES // STEP_LINES)
    assert final["valid_auc"] > 0.6

    reader, writer = os.pipe()
    with os.fdopen(reader) as source:
        waiting = clicks.start(*arguments("apart"), ranks=ranks, stdin=source)
    # Ten steps, and a part of the eleventh, which nobody has trained on when the run is stopped.
    os.write(writer, "".join(lines[: 10 * STEP_LINES + 9]).encode())
    wait_until(lambda: 10 in steps_of(clicks, "apart"), waiting)
    waiting.send_signal(signal.SIGTERM)
    _, errors = waiting.communicate(timeout=60)
    os.close(writer)
    assert "stopped and saved at step 10" in errors
    assert waiting.returncode == (75 if ranks is None else 1)  # torchrun's own

    resumed = feed(clicks, "".join(lines), *arguments("apart"), ranks=ranks)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming at step 10" in resumed.stderr
    assert saved_stream(clicks, "apart")["stream"] == state["stream"]
    expected, found = tensors(clicks, "whole"), tensors(clicks, "apart")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert metrics(clicks, "apart") == metrics(clicks, "whole")


def test_a_folder_that_grows_is_gone_on_with_on_other_ranks(clicks: Job) -> None:
    lines, folder = lines_of(clicks)[: 20 * STEP_LINES], clicks.folder / "stream"
    folder.mkdir()
    (clicks.folder / "all.csv").write_text("".join(lines))
    whole = clicks.run(*arguments("whole", "data.stream=true", path="all.csv"))
    assert whole.returncode == 0, whole.stderr
    half = 8 * STEP_LINES
    for name, part, ranks in (("hour-01", lines[:half], None), ("hour-02", lines[half:], 2)):
        (folder / name).write_text("".join(part))
        done = clicks.run(*arguments("run", "data.stream=true", path="stream"), ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert saved_stream(clicks, "run")["examples"] == len(lines)
    # The order of float32 sums differs on two ranks.
    for name, tensor in tensors(clicks, "whole").items():
        torch.testing.assert_close(tensors(clicks, "run")[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_waits_for_a_folder_to_grow(clicks: Job, wait_until: Wait) -> None:
    lines, folder = lines_of(clicks), clicks.folder / "stream"
    folder.mkdir()
    (folder / "hour-01").write_text("".join(lines[: 5 * STEP_LINES]))
    waiting = clicks.start(*arguments("run", "data.stream=true", "data.poll_seconds=0.2", path="stream"))
    wait_until(lambda: steps_of(clicks, "run") == [5], waiting)
    (folder / "hour-02.partial").write_text("".join(lines[5 * STEP_LINES : 10 * STEP_LINES]))
    (folder / "hour-02.partial").rename(folder / "hour-02")
    wait_until(lambda: 10 in steps_of(clicks, "run"), waiting)
    waiting.send_signal(signal.SIGTERM)
    waiting.communicate(timeout=60)
    assert waiting.returncode == 75
    assert saved_stream(clicks, "run")["stream"]["name"] == "hour-02"


def test_another_stream_is_refused_where_it_differs(clicks: Job) -> None:
    lines = lines_of(clicks)
    assert feed(clicks, "".join(lines[:640]), *arguments("run")).returncode == 0
    rest = feed(clicks, "".join(lines[640:]), *arguments("run"))
    assert rest.returncode == 2
    assert "the first 640 lines of standard input differ from the lines read before" in rest.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.epochs=2"], "a stream is read once"),
        (["schedule.name=linear"], "needs the number of steps, which is not known for a stream"),
        (["data.num_rows=null"], "cannot have a vocabulary: give data.num_rows"),
        (["data.columns=null"], "give data.columns"),
        (["data.poll_seconds=1"], "data.poll_seconds must be positive and needs a streamed folder"),
    ],
)
def test_what_a_stream_cannot_have_is_refused(clicks: Job, overrides: list[str], message: str) -> None:
    refused = feed(clicks, "", *arguments("run", *overrides))
    assert refused.returncode == 2
    assert message in refused.stderr
