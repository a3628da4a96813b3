from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedtrain.checkpoint import ShardView, save_checkpoint
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.export import Vectors, open_vectors
from embedtrain.sharding.layout import SpreadLayout

MakeRun = Callable[..., str]

WORDS = ["the", "king", "queen", "man", "woman", "naïve", "日本", '"', "it's", "a,b"]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Returns a function that writes a run folder with one checkpoint and gives its path."""

    def make(
        tables: Mapping[str, np.ndarray[Any, Any]],
        words: Sequence[str] | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        step: int = 12,
        dtype: torch.dtype = torch.float32,
        name: str = "run",
    ) -> str:
        run_path = tmp_path / name
        run_path.mkdir(exist_ok=True)
        shards = []
        for table, values in tables.items():
            layout = SpreadLayout(len(values), 1)
            weight = torch.empty(values.shape, dtype=dtype)
            weight[layout.slot_of(torch.arange(len(values)))] = torch.tensor(values).to(dtype)
            for tensor_name, tensor in (("weight", weight), ("accumulator", torch.zeros(len(values)))):
                kind = layout.description
                shards.append(ShardView(f"{table}/{tensor_name}", tuple(tensor.shape), 0, tensor, kind))
        save_checkpoint(f"{run_path}/checkpoints", step, shards, state or {}, ONE_PROCESS)
        if words is not None:
            lines = [f"{word}\t{1000 - row}\n" for row, word in enumerate(words)]
            (run_path / "vocabulary.tsv").write_text("".join(lines), encoding="utf-8", newline="\n")
        return str(run_path)

    return make


@pytest.fixture
def table() -> np.ndarray[Any, Any]:
    """[10, 6] float32: ordinary values and the ones that text formats get wrong."""
    values = np.random.default_rng(0).normal(size=(len(WORDS), 6)).astype(np.float32)
    values[3] = [0, -0.0, 1e-45, 1e18, 123456789, 0.1]
    return values


@pytest.fixture
def vectors(make_run: MakeRun, table: np.ndarray[Any, Any]) -> Iterator[Vectors]:
    with open_vectors(make_run({"word": table}, WORDS, state={"export_table": "word"})) as opened:
        yield opened
