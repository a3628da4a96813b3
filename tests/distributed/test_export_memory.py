"""Vectors are exported in blocks: in a process of its own, where no memory that other tests have freed hides it."""

from __future__ import annotations

import functools
import os
import threading

import numpy as np
import pytest

from embedtrain.export import export_vectors, open_vectors
from embedtrain.export.formats import FORMATS
from embedtrain.testing.ranks import run_ranks
from tests.unit.export import conftest

make_run = conftest.make_run


def peak_private_bytes(function) -> int:
    """Returns the most memory of its own (no mapped files) that the process has while `function` runs."""

    def private_bytes() -> int:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    peak = 0
    done = threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, private_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return peak


def memory_of_few_and_all_rows(group, run_path, format, output) -> tuple[int, int]:
    with open_vectors(run_path) as vectors:
        export = functools.partial(export_vectors, format=format, output=output, overwrite=True)
        few = peak_private_bytes(lambda: export(vectors, max_rows=12_000))
        return few, peak_private_bytes(lambda: export(vectors, max_rows=vectors.num_rows))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured through /proc")
@pytest.mark.parametrize(
    "format",
    [
        name if name == "word2vec" else pytest.param(name, marks=pytest.mark.slow)
        for name in FORMATS
        if name != "projector"  # shows few rows
    ],
)
def test_memory_does_not_grow_with_the_table(format, make_run, tmp_path):
    run_path = make_run({"item": np.broadcast_to(np.float32(0.123456), (50_000, 500))})
    ((few, all),) = run_ranks(
        1, memory_of_few_and_all_rows, run_path, format, str(tmp_path / "out"), timeout_seconds=200
    )
    table_mib, grown_mib = 50_000 * 500 * 4 / 2**20, (all - few) / 2**20
    assert grown_mib < table_mib / 4, f"{grown_mib:.0f} MiB more memory for {table_mib:.0f} MiB of vectors"
