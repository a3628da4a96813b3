"""A report by several ranks, of a run whose training deletes the checkpoint meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from embedtrain.checkpoint import find_checkpoints, remove_checkpoint
from embedtrain.cli import main
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import CheckpointError
from embedtrain.report import facts, write_report
from embedtrain.testing.threads import run_threads
from embedtrain.train import checkpoints

DATA = "c,label\n" + "".join(f"v{number % 3},{number % 2}\n" for number in range(64))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains a run and returns the paths of its checkpoints, oldest first."""
    monkeypatch.chdir(tmp_path)
    Path("ranking.yaml").write_text("model: ranking\n")
    Path("data.csv").write_text(DATA)
    data = ["data.path=data.csv", "data.valid_path=data.csv", "data.categorical=[c]", "data.cache_path=cache"]
    sizes = [
        "train.global_batch_size=32",
        "table.dim=4",
        "ranking.top=[8]",
        "checkpoint.every_steps=1",
        "train.epochs=2",
    ]
    log = ["log.tensorboard=false", "checkpoint.every_steps=1", "checkpoint.keep_last=null", "run.path=run"]
    assert main(["train", "ranking.yaml", *data, *sizes, *log]) == 0
    return [found.path for found in find_checkpoints("run/checkpoints")]


def report(ranks: Ranks) -> str:
    return write_report("run", None, [], Runtime(ranks, ranks.rank, torch.device("cpu")))


def test_the_next_checkpoint_is_read_if_one_is_deleted_under_one_of_the_ranks(
    run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, read = checkpoints.load_shards, facts._tables
    loaded: list[str] = []

    def load_late(reader: Any, *arguments: Any) -> None:
        loaded.append(reader.path)
        if len(loaded) == 2:  # the second rank comes late
            remove_checkpoint(run[-1])
        load(reader, *arguments)

    monkeypatch.setattr(checkpoints, "load_shards", load_late)
    assert run_threads(2, report) == ["run/report.html"] * 2
    assert loaded == [run[-1]] * 2 + [run[-2]] * 2
    assert "Scores of held-out examples" in Path("run/report.html").read_text()

    def read_late(*arguments: Any) -> Any:
        if Path(run[-2]).exists():
            remove_checkpoint(run[-2])
            raise CheckpointError("a file is missing")
        return read(*arguments)

    monkeypatch.setattr(facts, "_tables", read_late)
    assert len(run) == 4
    assert facts.read_facts("run").step == 2, "the newest one that is left"

    def fail(*arguments: Any) -> Any:
        raise CheckpointError("a file is damaged")

    monkeypatch.setattr(facts, "_tables", fail)
    with pytest.raises(CheckpointError, match="a file is damaged"):
        facts.read_facts("run")
