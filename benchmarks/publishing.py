"""Rows published per second to a folder and to Redis, and the bytes of an increment under Zipf traffic.

python benchmarks/publishing.py --rows 1000000 --dim 16 --looked-up 200000 [--redis redis://localhost:6379/0]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from embedtrain.checkpoint import ShardView, save_checkpoint
from embedtrain.data.row_names import values_source, write_values
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.serve.publication import publish
from embedtrain.serve.published import Mirror, RedisRows, split_prefix
from embedtrain.sharding.layout import SpreadLayout


def save(run: str, step: int, rows: Tensor) -> None:
    """Saves a checkpoint of a table whose rows are called value-0, value-1 and so on."""
    layout = SpreadLayout(len(rows), 1)
    weight = torch.empty_like(rows)
    weight[layout.slot_of(torch.arange(len(rows)))] = rows
    numbers = pa.array(np.arange(len(rows))).cast(pa.string())
    words = pa.table({"word": pc.binary_join_element_wise("value", numbers, "-"), "count": np.ones(len(rows), int)})
    write_values(run, "item", words, has_others=False)
    state = {"row_names": {"item": values_source("item", words)}}
    view = ShardView("item/weight", tuple(rows.shape), 0, weight, layout.description)
    save_checkpoint(f"{run}/checkpoints", step, [view], state, ONE_PROCESS)


def touched(num_rows: int, num_looked_up: int, exponent: float) -> Tensor:
    """Returns the rows that so many look-ups touch, if row r is looked up in proportion to 1 / (r + 1) ** exponent."""
    shares = 1.0 / np.arange(1, num_rows + 1) ** exponent
    drawn = np.searchsorted(np.cumsum(shares) / shares.sum(), np.random.default_rng(0).random(num_looked_up))
    return torch.from_numpy(np.unique(np.minimum(drawn, num_rows - 1)))


def measure(run: str, url: str) -> None:
    """Publishes the checkpoints one after another, then nothing; prints what each took."""
    for step in (1, 2, 2):
        start, own_start = time.perf_counter(), time.process_time()
        done = publish(run, url, step=step)
        seconds, own_seconds = time.perf_counter() - start, time.process_time() - own_start
        counts = done.tables.get("item")
        num_rows = 0 if counts is None else counts.added + counts.changed
        written = list(Path(url).glob(f"part-{done.number:09d}-*/*")) if done.is_new and ":" not in url else []
        sizes = ", ".join(f"{path.name[5:]} {path.stat().st_size:,}" for path in sorted(written))
        took = f"{seconds:7.2f} s, {own_seconds:6.2f} s of a core"
        print(f"  {num_rows:10,} rows in {took}  {num_rows / seconds:12,.0f} rows/s  {sizes}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--looked-up", type=int, default=200_000, help="look-ups between two publications")
    parser.add_argument("--exponent", type=float, default=1.05)
    parser.add_argument("--redis", help="URL of an empty server")
    given = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(given.rows, given.dim, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        run, out = f"{folder}/run", f"{folder}/out"
        save(run, 1, rows)
        changed = touched(given.rows, given.looked_up, given.exponent)
        rows[changed] += 0.01 * torch.randn(len(changed), given.dim, generator=generator)
        save(run, 2, rows)
        print(f"{given.rows:,} rows of {given.dim}: {4 * given.dim * given.rows:,} bytes of values")
        print(f"{given.looked_up:,} look-ups touch {len(changed):,} rows: {len(changed) / given.rows:.1%}")
        print("folder: whole, increment, no change")
        measure(run, out)
        start = time.perf_counter()
        mirror = Mirror(out)
        mirror.update()
        print(f"  a mirror reads all in {time.perf_counter() - start:.2f} s")
        if given.redis:
            print("Redis: whole, increment, no change")
            measure(run, given.redis)
            reader = RedisRows(given.redis)
            wanted = np.random.default_rng(2).integers(0, given.rows, (100, 1000))
            names = [[f"value-{row}" for row in part] for part in wanted.tolist()]
            start = time.perf_counter()
            for each in names:
                reader.vectors("item", each)
            print(f"  {100_000 / (time.perf_counter() - start):,.0f} rows read per second, a thousand at a time")
            import redis

            memory = redis.Redis.from_url(split_prefix(given.redis)[0]).info("memory")
            print(f"  {memory['used_memory']:,} bytes of memory")


if __name__ == "__main__":
    main()
