"""Kills publishers at their moments: `python -m tests.faults.publishing FOLDER FIRST EVERY [REDIS]`.

A process of its own, without threads, forks each publisher, kills it at its n-th moment, and looks at what readers find
meanwhile and afterwards. It publishes to a folder, and to Redis if there is a URL. Prints a line of JSON.

Arguments:
    FOLDER: an empty folder.
    FIRST: the first publisher is killed at this moment, from 1 on.
    EVERY: so many moments later the next one is.
    REDIS: URL of an empty server.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from embedtrain.serve.publication import publish
from embedtrain.serve.published import PREFIX, Mirror, RedisRows
from tests.faults.points import patch
from tests.stores import save

POINTS = {
    "folder": (
        "embedtrain.storage:make_folder",
        "embedtrain.storage:write",
        "embedtrain.storage:new_file",
        "pyarrow.parquet:ParquetWriter.write_table",
        "embedtrain.storage:create",
        "embedtrain.storage:remove",
        "embedtrain.storage:remove_empty_folder",
        "os:fsync",
        "os:link",
    ),
    "redis": ("redis.connection:Connection.send_packed_command",),
}
NUM_ROWS, DIM = 60, 4

Tables = Mapping[str, Mapping[str, Sequence[float]]]


def states() -> dict[str, Tables]:
    """Returns three states of a table: what the second changes, adds and deletes is undone in the third."""
    generator = np.random.default_rng(0)
    first = {f"w{row}": generator.normal(size=DIM).tolist() for row in range(NUM_ROWS)}
    second = {name: row for name, row in first.items() if name not in ("w3", "w4")}
    second |= {f"w{row}": [float(row)] * DIM for row in range(10, 20)} | {"new": [1.0] * DIM, "newer": [2.0] * DIM}
    third = first | {"w50": [5.0] * DIM}
    return {"first": {"shop": first}, "second": {"shop": second}, "third": {"shop": third}}


class Reader:
    """Reads all rows, as one consumer that follows and as one that comes new."""

    def __init__(self, kind: str, url: str) -> None:
        self.kind, self.url = kind, url
        self.mirror = Mirror(url) if kind == "folder" else None
        self.names = sorted({name for state in states().values() for name in state["shop"]})

    def rows(self) -> list[NDArray[np.float32]]:
        if self.mirror is None:
            return [RedisRows(self.url).vectors("shop", self.names)[0]]
        self.mirror.update()
        fresh = Mirror(self.url)
        fresh.update()
        return [each.vectors("shop", self.names) for each in (self.mirror, fresh)]

    def state(self, known: Mapping[str, Tables]) -> set[str]:
        """Returns the states that were read; fails if rows are of no state."""
        found = set()
        for rows in self.rows():
            alike = [
                name
                for name, tables in known.items()
                if np.array_equal(rows, expected_rows(tables, self.names), equal_nan=True)
            ]
            assert alike, "what was read is no version"
            found.update(alike)
        return found


def expected_rows(tables: Tables, names: Sequence[str]) -> NDArray[np.float32]:
    nothing = [np.nan] * DIM
    return np.array([tables["shop"].get(name, nothing) for name in names], np.float32)


def killed_at(number: int, points: Sequence[str], work: Callable[[], object], watch: Callable[[], object]) -> str:
    """Forks a process that does the work and dies at a moment; returns the point, "" if the work ended before."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0

        def tick(point: str) -> None:
            nonlocal count
            count += 1
            if count == number:
                os.write(write_end, point.encode())
                os.kill(os.getpid(), signal.SIGKILL)

        for point in points:
            patch(point, tick)
        try:
            work()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    os.close(write_end)
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        watch()
        time.sleep(0.03)
    with os.fdopen(read_end) as said:
        return said.read()


def strike(kind: str, url: str, folder: Path, moments: Iterator[int]) -> dict[str, Any]:
    """Kills one publisher after another until one ends before its moment; returns what was struck."""
    known = states()
    publish(str(folder / "first"), url)
    reader, struck, ends = Reader(kind, url), Counter[str](), Counter[str]()
    for number in moments:
        point = killed_at(
            number,
            POINTS[kind],
            lambda: publish(str(folder / "second"), url),
            lambda: reader.state({name: known[name] for name in ("first", "second")}),
        )
        if not point:
            break
        if kind == "redis":
            # As its expiry would, after half a minute.
            redis.Redis.from_url(url).delete(f"{PREFIX}:lock")
        found = reader.state(known)
        assert len(found) == 1 and found <= {"first", "second"}, found
        ends[found.pop()] += 1
        struck[point] += 1
        for name in ("third", "first"):
            publish(str(folder / name), url)
            assert reader.state(known) == {name}
    assert reader.state(known) == {"second"}
    return {"struck": struck, "ends": ends}


def main() -> None:
    folder, first, every = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    urls = dict(zip(POINTS, [str(folder / "out"), *sys.argv[4:]], strict=False))
    for name, tables in states().items():
        save(folder / name, 1, tables)
    print(json.dumps({kind: strike(kind, url, folder, itertools.count(first, every)) for kind, url in urls.items()}))


if __name__ == "__main__":
    main()
