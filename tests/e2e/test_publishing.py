"""A run publishes itself while it trains, by processes of its own."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.data.row_names import read_row_names
from embedtrain.serve.published import Mirror
from embedtrain.sharding.layout import read_layout
from tests import launching, odd_rows


@pytest.mark.slow
def test_a_run_on_two_ranks_publishes_its_rows_and_its_network(tmp_path: Path) -> None:
    odd_rows.write_csv(tmp_path / "train.csv", 1500, odd_share=0.05)
    (tmp_path / "config.yaml").write_text(odd_rows.CONFIG)
    settings = ["data.path=train.csv", "data.cache_path=cache", "run.path=run", "run.device=cpu", "train.epochs=20"]
    settings += ["checkpoint.every_steps=100", "checkpoint.full_every=3", "publish.to=out", "publish.every_seconds=0.5"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "embedtrain", "train", "config.yaml", *settings]
    done = launching.run(command, cwd=tmp_path, timeout=280)
    assert done.returncode == 0, done.stderr
    assert re.search(r"published: out: version \d+, step [\d,]+$", done.stderr, re.MULTILINE), "the line of the command"
    mirror = Mirror(str(tmp_path / "out"))
    mirror.update()
    assert mirror.version is not None
    newest = latest_checkpoint(str(tmp_path / "run" / "checkpoints"))
    assert newest is not None
    with CheckpointReader(newest) as reader:
        assert mirror.version.step == reader.step
        assert len(mirror.version.tables) == 6
        for table in mirror.version.tables:
            info = reader.table(table)
            names = read_row_names(str(tmp_path / "run"), reader.state, table, info.shape[0]).words
            layout = read_layout(info.layout, info.shape[0], table)
            rows = reader.gather(f"{table}/weight", layout.slot_of(torch.arange(len(names))))
            np.testing.assert_array_equal(mirror.vectors(table, list(names)), rows.numpy())
        dense = mirror.version.dense()
        assert dense and {name: values.shape for name, values in dense.items()} == {
            name.removeprefix("dense/"): tuple(tensor.shape)
            for name, tensor in reader.replicated().items()
            if name.startswith("dense/")
        }
