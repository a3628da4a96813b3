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
from embedtrain.serve.published import Mirror, RedisRows
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
    model: str | None = None,
) -> None:
    """Saves a checkpoint of a run.

    Args:
        run: the run folder.
        step: of the checkpoint.
        tables: by name, the rows; the names of each are written to the run folder anew.
        ids: [num_rows, dim] of a table `place`, whose rows are ids; None without one.
        dense: the network's parameters.
        model: what kind of model the run's configuration names; None for a checkpoint without a configuration.
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
    state = {"row_names": sources, **({} if model is None else {"config": {"model": model}})}
    save_checkpoint(f"{run}/checkpoints", step, shards, state, ONE_PROCESS, replicated)


def some_rows(num_rows: int = 30, dim: int = 4, seed: int = 0) -> dict[str, list[float]]:
    values = np.random.default_rng(seed).normal(size=(num_rows, dim)).astype(np.float32)
    return {f"w{row}": values[row].tolist() for row in range(num_rows)}


class Consumer:
    """Reads what was published, as a program that follows would."""

    def __init__(self, url: str) -> None:
        self._redis = RedisRows(url) if url.startswith("redis:") else None
        self._mirror = None if self._redis is not None else Mirror(url)

    def rows(self, table: str, names: Sequence[str]) -> NDArray[np.float32]:
        if self._redis is not None:
            return self._redis.vectors(table, names)[0]
        assert self._mirror is not None
        self._mirror.update()
        return self._mirror.vectors(table, names)

    def dense(self) -> dict[str, list[float]]:
        if self._redis is not None:
            found = self._redis.dense()[0]
        else:
            assert self._mirror is not None and self._mirror.version is not None
            found = self._mirror.version.dense()
        return {name: values.tolist() for name, values in found.items()}

    def require(self, table: str, rows: Mapping[str, Sequence[float]], *absent: str) -> None:
        """Fails unless a table has these rows, and none of the names in `absent`."""
        found = self.rows(table, [*rows, *absent])
        np.testing.assert_array_equal(found[: len(rows)], np.array(list(rows.values()), np.float32))
        assert np.isnan(found[len(rows) :]).all()


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
