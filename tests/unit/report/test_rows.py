from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.export import Vectors
from embedtrain.report import rows


def test_files_of_questions_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["a", "b", "c", "d"]
    vectors = Vectors("word", 1, 4, 4, words, None, lambda start, stop: np.eye(4, dtype=np.float32)[start:stop])
    monkeypatch.setattr(rows, "open_run_vectors", lambda *arguments: vectors)
    paths = [str(tmp_path / name) for name in ("x.txt", "y.txt")]
    for path in paths:
        Path(path).write_text(": s\na b c d\n")
    runtime = Runtime(ONE_PROCESS, 0, torch.device("cpu"))

    def found(analogies: list[str]) -> list[tuple[str, list[str]]]:
        sections = rows.row_sections("run", ["a"], analogies, runtime, None)
        return [(s.title, list(s.measures)) for s in sections if s.title.startswith("Analogies")]

    assert found(paths[:1] * 2) == [("Analogies", ["analogies"])]
    assert found(paths) == [(f"Analogies of {path}", [f"analogies of {path}"]) for path in paths]
