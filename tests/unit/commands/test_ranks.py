"""Commands that read a run work under torchrun too: every rank opens the run, and rank 0 alone prints and writes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import embedtrain.distributed.runtime
import embedtrain.recipes.trained
import embedtrain.report.writing
from embedtrain.cli import main
from embedtrain.export.vectors import Vectors

ROWS = np.tri(4, dtype=np.float32)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "run", "--similarity", "pairs.tsv"],
        ["neighbors", "run", "a"],
        ["export", "run", "--format", "word2vec", "--output", "out"],
        ["report", "run", "--output", "out"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_rank_0_alone_prints_and_writes(
    arguments: list[str],
    rank: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pairs.tsv").write_text("a b 1\nb c 2\nc d 3\n")
    vectors = Vectors("input", 1, 4, 4, list("abcd"), [4, 3, 2, 1], lambda start, stop: ROWS[start:stop])
    runtime = SimpleNamespace(rank=rank, ranks=SimpleNamespace(rank=rank, run_on_each=lambda do: do()))
    monkeypatch.setattr(embedtrain.distributed.runtime, "init_distributed", lambda **_: runtime)
    monkeypatch.setattr(embedtrain.recipes.trained, "open_run_vectors", lambda *_: nullcontext(vectors))
    for name, answer in (("read_facts", "facts"), ("_sections", []), ("run_page", None)):
        monkeypatch.setattr(embedtrain.report.writing, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(embedtrain.report.writing, "render", lambda *_: "the page")
    assert main(arguments) == 0
    assert bool(capsys.readouterr().out) == (rank == 0)
    assert Path("out").exists() == (rank == 0 and "out" in arguments)
