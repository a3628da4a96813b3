"""A run with checkpoints of given rows, and a Redis server of the test's own: what publications are tested with."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from embedtrain.checkpoint import ShardView, save_checkpoint
from embedtrain.data.row_names import IDS, values_source, write_values
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.sharding.layout import SpreadLayout

Rows = Mapping[str, Sequence[float]]
"""A vector for each name."""


def save(
    run: Path,
    step: int,
    tables: Mapping[str, Rows],
    *,
    ids: NDArray[np.float32] | None = None,
    dense: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Saves a checkpoint of a run.

    Args:
        run: the run folder.
        step: of the checkpoint.
        tables: by name, the rows; the names of each are written to the run folder anew.
        ids: [num_rows, dim] of a table `place`, whose rows are ids; None without one.
        dense: the network's parameters.
    """
    values, sources = {name: np.array(list(rows.values()), np.float32) for name, rows in tables.items()}, {}
    for name, rows in tables.items():
        words = pa.table({"word": list(rows), "count": [1] * len(rows)})
        write_values(str(run), name, words, has_others=False)
        sources[name] = values_source(name, words)
    if ids is not None:
        values["place"], sources["place"] = ids, IDS
    shards = []
    for name, array in values.items():
        layout = SpreadLayout(len(array), 1)
        weight = torch.empty(array.shape)
        weight[layout.slot_of(torch.arange(len(array)))] = torch.from_numpy(array)
        shards.append(ShardView(f"{name}/weight", tuple(array.shape), 0, weight, layout.description))
    replicated = {f"dense/{name}": torch.tensor(each) for name, each in (dense or {}).items()}
    save_checkpoint(f"{run}/checkpoints", step, shards, {"row_names": sources}, ONE_PROCESS, replicated)


@contextmanager
def redis_server(folder: Path) -> Iterator[str | None]:
    """Starts a Redis server that keeps nothing; yields its URL, or None if there is no program `redis-server`."""
    program = shutil.which("redis-server")
    if program is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", str(folder)]
    with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as server:
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert server.poll() is None, "redis-server did not start"
                    time.sleep(0.01)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            server.terminate()
