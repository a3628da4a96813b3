"""Bags pooled at the examples and at the owners of their rows, on two ranks: bytes sent and time of a step."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import launch
import numpy as np
import torch
from record import Measure, append_results

import embedtrain as et
from embedtrain.distributed.runtime import init_distributed, shut_down
from embedtrain.distributed.stages import bytes_sent

NUM_TABLES, NUM_ROWS, DIM, NUM_BAGS, EXPONENT = 4, 200_000, 64, 512, 1.05
LENGTHS = (1, 20, 100)
WAYS = ("example", "owner", "auto")
REPEATS, WARMUP = 9, 2

Step = tuple[et.EmbeddingCollection, et.optim.RowwiseAdagrad]


def main() -> int:
    """Runs the benchmark."""
    if not launch.is_rank():
        return launch.run_ranks()
    runtime = init_distributed(device="cpu")
    measures = []
    for length in LENGTHS:
        steps = {way: collection(way) for way in WAYS}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        sent = dict.fromkeys(WAYS, 0)
        for repeat in range(WARMUP + REPEATS):
            batch = make_batch(length, runtime.rank, repeat)
            for way in WAYS:  # in turns
                sent_before = bytes_sent()
                seconds[way].append(run_step(*steps[way], batch))
                sent[way] = bytes_sent() - sent_before
        medians = {way: statistics.median(seconds[way][WARMUP:]) for way in WAYS}
        if runtime.rank == 0:
            print(
                f"bags of {length:>3}: "
                + "; ".join(f"{way} {sent[way] / 1e6:.2f} MB, {medians[way] * 1e3:.2f} ms" for way in WAYS),
                flush=True,
            )
        measures += [
            Measure(f"bags of {length}", f"{kind}, pooled at the owner against the example", *pair, ratio, 2, 1)
            for kind, pair, ratio in (
                (
                    "seconds of a step",
                    (medians["owner"], medians["example"]),
                    medians["example"] / medians["owner"],
                ),
                (
                    "bytes sent in a step",
                    (sent["owner"], sent["example"]),
                    sent["example"] / sent["owner"],
                ),
            )
        ]
    shut_down()
    if runtime.rank == 0:
        append_results("owner_pooling", f"torch {torch.__version__}", measures)
    return 0


def collection(pool_at: Any) -> Step:
    """Returns tables and their optimizer."""
    tables = et.EmbeddingCollection(
        [et.TableSpec(f"t{i}", NUM_ROWS, DIM) for i in range(NUM_TABLES)],
        [et.FeatureSpec(f"t{i}", pooling="sum", pool_at=pool_at) for i in range(NUM_TABLES)],
    )
    return tables, et.optim.RowwiseAdagrad(tables, lr=0.01)


def make_batch(length: int, rank: int, repeat: int) -> dict[str, et.Jagged]:
    """Returns bags of ids by Zipf's law."""
    generator = np.random.default_rng([length, rank, repeat])
    shares = np.cumsum(np.arange(1, NUM_ROWS + 1, dtype=np.float64) ** -EXPONENT)
    lengths = torch.full((NUM_BAGS,), length)
    return {
        f"t{i}": et.Jagged(
            torch.from_numpy(np.searchsorted(shares, generator.random(NUM_BAGS * length) * shares[-1])), lengths
        )
        for i in range(NUM_TABLES)
    }


def run_step(tables: et.EmbeddingCollection, optimizer: et.optim.RowwiseAdagrad, batch: dict[str, et.Jagged]) -> float:
    """Returns the seconds of looking up, backward and update."""
    started_at = time.perf_counter()
    torch.stack([vectors.sum() for vectors in tables(batch).values()]).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started_at


if __name__ == "__main__":
    sys.exit(main())
