"""Struck at any moment, a run goes on from its last complete checkpoint and ends bit for bit as undisturbed.

This is the short form; `python -m tests.faults --all` is the whole.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from embedtrain.checkpoint import CheckpointReader
from tests.faults.damage import count_noticed
from tests.faults.harness import Fault, Range
from tests.unit.checkpoint.example import save

pytestmark = pytest.mark.timeout(600)

STEP = "embedtrain.train.trainer:train_step"
STAGE = "embedtrain.embedding.collection:EmbeddingCollection.shard_views"
WRITE = "embedtrain.storage:write"
CREATE = "embedtrain.storage:create"
REMOVE = "embedtrain.storage:remove"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Range:
    return Range(tmp_path_factory.mktemp("faults"))


def test_a_run_that_is_struck_while_it_saves_ends_as_undisturbed(runs: Range) -> None:
    faults = [
        Fault(WRITE, 20, 0, "SIGKILL", "both"),
        Fault(CREATE, 4, 0, "SIGKILL", "peer"),
        Fault(WRITE, 10, 1, "ENOSPC"),
    ]
    struck = runs.survive("struck-briefly", faults)
    assert struck.num_struck == len(faults)
    assert "rank 1: OSError: [Errno 28] No space left on device" in "".join(struck.errors)


@pytest.mark.slow
def test_a_run_that_is_struck_in_every_phase_ends_as_undisturbed(runs: Range) -> None:
    faults = [
        Fault(WRITE, 30, 0, "SIGKILL", "launcher"),
        Fault(STEP, 70, 1, "SIGKILL", "self"),
        Fault(STAGE, 4, 0, "SIGTERM", "peer"),
        Fault(WRITE, 20, 0, "SIGKILL", "both"),
        Fault(CREATE, 4, 0, "SIGKILL", "peer"),
        Fault(REMOVE, 2, 0, "SIGKILL", "self"),
        Fault(WRITE, 10, 1, "ENOSPC"),
        Fault(CREATE, 3, 0, "EACCES"),
    ]
    struck = runs.survive("struck", faults)
    assert struck.num_struck == len(faults)
    errors = "".join(struck.errors)
    assert "rank 1: OSError: [Errno 28] No space left on device" in errors
    assert "PermissionError: [Errno 13] Permission denied" in errors
    print(f"{struck.num_struck} of {len(faults)} faults survived")


@pytest.mark.serial
def test_a_rank_that_stands_still_is_named_in_time(runs: Range) -> None:
    process = runs.start("still", [Fault(STEP, 59, 1, "SIGSTOP")], "run.timeout_seconds=5")
    status = runs.folder / "still" / "status.json"
    deadline = time.monotonic() + 60
    while not status.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    _, errors = process.communicate()
    message = json.loads(status.read_text())["error"]
    assert message.startswith("rank 1 did not take part in step 30 and does not answer: died, was stopped, or hangs")
    assert "run.timeout_seconds=5" in message
    assert re.search(r"Last seen: .*rank 0 on \S+ in step 30, .*rank 1 on \S+ in (step|the preparation)", message)
    assert f"embedtrain: failed: {message}" in errors
    (struck,) = [event["at"] for event in runs.events("still") if event["kind"] == "struck"]
    assert status.stat().st_mtime - struck < 5 + 3 + 3


def test_damaged_files_are_refused(runs: Range, tmp_path: Path) -> None:
    whole = Path(runs.latest("whole"))
    with CheckpointReader(str(whole)) as reader:
        tables = {name: reader.read(name, 0, info.shape[0]) + 1 for name, info in reader.tensors.items()}
    foreign = Path(save(tmp_path / "other", 1, tables, 2))
    folder = shutil.copytree(whole, tmp_path / "damaged")
    counts = count_noticed(folder, foreign)
    assert counts == {
        "truncated: refused": 60,
        "bit flipped: refused": 600,
        "removed: refused": 3,
        "swapped: refused": 3,
        "of another run: refused": 3,
    }
    print(dict(counts))
