"""Another program reads a checkpoint by `docs/checkpoint_format.md`, with json, safetensors and numpy alone."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from embedtrain.checkpoint import ShardView
from embedtrain.sharding.layout import SpreadLayout
from tests.unit.checkpoint.example import run_threads, save_checkpoint, views_of


def read_newest(run: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Returns each tensor of the newest checkpoint, its rows in order of ids."""
    folders = [folder for folder in (run / "checkpoints").glob("step-*") if (folder / "manifest.json").exists()]
    newest = max(folders, key=lambda folder: int(folder.name.removeprefix("step-")))
    manifest = json.loads((newest / "manifest.json").read_text())
    if manifest["format"] != "embedtrain-checkpoint" or manifest["version"] != 1:
        raise ValueError(f"{newest} is of another format")
    return {name: read_tensor(newest, name, entry) for name, entry in manifest["tensors"].items()}


def read_tensor(folder: Path, name: str, entry: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Returns one tensor, its rows in order of ids."""
    slots = np.empty(entry["shape"], dtype=entry["dtype"])
    for piece in entry["pieces"]:
        with safe_open(str(folder / piece["file"]), framework="numpy") as file:
            rows = file.get_tensor(name)
        if len(rows) != piece["rows"]:
            raise ValueError(f"{piece['file']} has {len(rows)} rows of {name}")
        slots[piece["offset"] : piece["offset"] + piece["rows"]] = rows
    factor, size = entry["layout"]["multiplier"], entry["layout"].get("block_rows", 1)
    ids = np.arange(entry["shape"][0])
    num_blocks = len(ids) // size
    moved = factor * (ids // size) % num_blocks * size + ids % size
    return slots[np.where(ids < num_blocks * size, moved, ids)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("num_rows", [1, 2, 37, 320, 131_085])
def test_every_row_is_right(num_rows: int, world_size: int, tmp_path: Path) -> None:
    layout = SpreadLayout(num_rows, world_size)
    by_id = torch.arange(num_rows * 4, dtype=torch.float32).reshape(num_rows, 4)
    states = torch.rand(num_rows)
    ids = layout.id_of(torch.arange(num_rows))
    tables = {"word/weight": by_id[ids], "word/accumulator": states[ids]}

    def save_rank(ranks: Any, rank: int) -> str:
        views = [
            ShardView(view.name, view.global_shape, view.offset, view.tensor, layout.description)
            for view in views_of(tables, rank, world_size)
        ]
        return save_checkpoint(str(tmp_path / "checkpoints"), 12, views, {}, ranks)

    (path, *_) = run_threads(world_size, save_rank)
    assert isinstance(path, str), path
    (tmp_path / "checkpoints" / "step-000000013").mkdir()  # what a killed save left
    found = read_newest(tmp_path)
    np.testing.assert_array_equal(found["word/weight"], by_id.numpy())
    np.testing.assert_array_equal(found["word/accumulator"], states.numpy())


def test_the_reader_is_short_and_needs_no_embedtrain() -> None:
    functions = [
        node
        for node in ast.parse(Path(__file__).read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("read_")
    ]
    assert sum(node.end_lineno - node.lineno + 1 for node in functions if node.end_lineno) <= 40
    names = {node.id for function in functions for node in ast.walk(function) if isinstance(node, ast.Name)}
    assert not names & {"torch", "ShardView", "SpreadLayout"}
