"""Rows scored per second on one core, by a run and by its package; loading a package of a large table.

python benchmarks/serving.py RUN ROWS.csv            # RUN: of ranking, on lines as ROWS.csv has them
python benchmarks/serving.py --load-rows 10000000    # a table of so many rows of 16, with a vocabulary
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.recipes.base import PackedTable
from embedtrain.serve.opening import config_for_files, open_scorer, pack_run, score_options
from embedtrain.serve.package import write_table, write_texts
from embedtrain.serve.scorer import CHUNK_ROWS, Scorer, Table, Vocabulary, read_rows
from embedtrain.serve.scoring import score_rows

DIM = 16
RUNTIME = Runtime(ONE_PROCESS, 0, torch.device("cpu"))


def measure_rows(run: str, data: str) -> dict[str, float]:
    """Returns rows per second: of a run from its file, and of its package from the file and from rows in memory."""
    config = config_for_files(run, [])
    scorer = open_scorer(config, RUNTIME)
    start = time.perf_counter()
    num_rows = sum(len(part.labels) for part in score_rows(scorer, score_options(config, data, [])))
    found = {"rows": num_rows, "run_rows_per_second": num_rows / (time.perf_counter() - start)}
    with tempfile.TemporaryDirectory() as folder:
        pack_run(run, None, f"{folder}/package", RUNTIME, dtype="float32", overwrite=False)
        packed = Scorer(f"{folder}/package")
        start = time.perf_counter()
        rows = [row for _, row in read_rows(data, packed.manifest["lines"], packed.columns) if not isinstance(row, str)]
        read_seconds = time.perf_counter() - start
        start = time.perf_counter()
        packed.score(rows)
        seconds = time.perf_counter() - start
        found["package_rows_per_second"] = len(rows) / seconds
        found["package_rows_per_second_with_reading"] = len(rows) / (read_seconds + seconds)
        found |= measure_network(packed, rows)
    return found


@torch.no_grad()
def measure_network(packed: Scorer, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Returns rows per second from ids and numbers on: of the package, and of `EmbeddingBag` with the same network."""
    chunks = [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]
    features = packed._features
    ids = [[feature.ids([row.get(feature.name) for row in chunk], {}) for feature in features] for chunk in chunks]
    dense = [torch.randn(len(chunk), len(packed.manifest["dense"])) for chunk in chunks]
    # Tables in memory, not mapped.
    bags = [
        nn.EmbeddingBag.from_pretrained(feature._table._weight.clone().float(), mode=feature._facts["pooling"])
        for feature in features
    ]
    flat = [[torch.from_numpy(values) for values, _ in chunk] for chunk in ids]
    starts = [
        [
            torch.arange(len(values)) if lengths is None else torch.from_numpy(lengths.cumsum() - lengths)
            for values, lengths in chunk
        ]
        for chunk in ids
    ]

    def of_package(number: int) -> Tensor:
        vectors = [feature.vectors(*each) for feature, each in zip(features, ids[number], strict=True)]
        return packed._network(dense[number], vectors)

    def of_bags(number: int) -> Tensor:
        vectors = [bag(*each) for bag, *each in zip(bags, flat[number], starts[number], strict=True)]
        return packed._network(dense[number], vectors)

    def of_network(number: int) -> Tensor:
        return packed._network(dense[number], pooled)

    pooled = [feature.vectors(*each) for feature, each in zip(features, ids[0], strict=True)]
    torch.testing.assert_close(of_package(0), of_bags(0), rtol=1e-4, atol=1e-4)
    found = {}
    for name, score, numbers in (
        ("package_from_ids", of_package, range(len(chunks))),
        ("embedding_bag_from_ids", of_bags, range(len(chunks))),
        ("network_alone", of_network, [0] * len(chunks)),
    ):
        seconds = min(_seconds(score, numbers) for _ in range(3))
        found[f"{name}_rows_per_second"] = sum(len(chunks[number]) for number in numbers) / seconds
    return found


def _seconds(score: Callable[[int], Tensor], numbers: Iterable[int]) -> float:
    start = time.perf_counter()
    for number in numbers:
        score(number)
    return time.perf_counter() - start


def measure_load(num_rows: int, dtype: str) -> dict[str, float]:
    """Returns seconds and memory of opening a table and its vocabulary, and of 8,192 look-ups in each."""
    generator = torch.Generator().manual_seed(1)

    def blocks() -> Iterator[Tensor]:
        for start in range(0, num_rows, 1 << 17):
            yield torch.randn(min(1 << 17, num_rows - start), DIM, generator=generator)

    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/table", "wb") as file:
            write_table(file, PackedTable(num_rows, DIM, blocks), dtype)  # type: ignore[arg-type]
        with open(f"{folder}/texts", "wb") as file:
            numbers = pa.array(np.arange(num_rows)).cast(pa.string())
            texts = pc.binary_join_element_wise("value", numbers, "-")
            write_texts(file, texts.cast(pa.large_string()).cast(pa.large_binary()))
        num_bytes = os.path.getsize(f"{folder}/table")
        found: dict[str, float] = {"table_bytes": num_bytes, "texts_bytes": os.path.getsize(f"{folder}/texts")}
        pid = os.fork()
        if pid == 0:
            process = psutil.Process()
            before = process.memory_info()
            start = time.perf_counter()
            table, texts = Table(folder, "table"), Vocabulary(folder, "texts")
            found["load_seconds"] = time.perf_counter() - start
            found["load_resident_bytes"] = process.memory_info().rss - before.rss
            wanted = [f"value-{row}".encode() for row in np.random.default_rng(0).integers(0, num_rows, 8192)]
            start = time.perf_counter()
            table.rows(texts.rows(wanted) - 1)
            found["look_up_8192_seconds"] = time.perf_counter() - start
            after = process.memory_info()
            found["looked_up_resident_bytes"] = after.rss - before.rss
            # Without pages of the files, which the system takes back when it needs them.
            found["looked_up_private_bytes"] = after.rss - after.shared - (before.rss - before.shared)
            Path(folder, "found.json").write_text(json.dumps(found))
            os._exit(0)
        os.waitpid(pid, 0)
        return dict(json.loads(Path(folder, "found.json").read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?")
    parser.add_argument("data", nargs="?")
    parser.add_argument("--load-rows", type=int)
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure_load(given.load_rows, given.dtype) if given.load_rows else measure_rows(given.run, given.data)
    for name, value in found.items():
        print(f"{value:16,.3f}  {name}")


if __name__ == "__main__":
    main()
