"""Whatever ends a run, its sinks are closed and told."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedtrain import cli
from embedtrain.metrics.sinks import Record, RunEnd
from embedtrain.train import run as run_module
from embedtrain.train.trainer import Trainer


class Sink:
    """Notes how the run ended; one that fails must not keep the others open."""

    def __init__(self) -> None:
        self.ends: list[RunEnd] = []

    def log(self, record: Record) -> None:
        """Takes nothing."""

    def flush(self) -> None:
        """Writes nothing."""

    def close(self, end: RunEnd) -> None:
        self.ends.append(end)


@pytest.mark.parametrize(
    ("outcome", "end", "status"),
    [(True, "finished", 0), (False, "preempted", 75), (ValueError("out of luck"), "failed", 1)],
)
def test_sinks_are_told_how_the_run_ended(
    outcome: bool | Exception,
    end: RunEnd,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sinks = [Sink(), Sink()]

    def run(*_: object, **__: object) -> bool:
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(Trainer, "run", run)
    monkeypatch.setattr(run_module, "_build_sinks", lambda *_: sinks)
    (tmp_path / "corpus.txt").write_text("a b a b c c b a")
    settings = [f"data.path={tmp_path}/corpus.txt", f"run.path={tmp_path}/run", "data.min_count=1", "run.device=cpu"]
    settings += [f"data.cache_path={tmp_path}/cache", "log.rows_every_steps=null"]
    assert cli.main(["train", "word2vec", *settings]) == status
    assert [sink.ends for sink in sinks] == [[end], [end]]
