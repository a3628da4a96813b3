"""Recall and queries per second of the kinds of faiss index, on vectors around random centres.

python benchmarks/index.py --rows 1000000 --dim 64 --kinds flat,ivfpq,hnsw
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np

from embedtrain.export.index import build_index
from embedtrain.export.vectors import FloatRows, Vectors, unit_rows

QUERIES, K = 1000, 20


def some_vectors(num_rows: int, dim: int) -> FloatRows:
    """Returns vectors around a thousandth as many centres, each three times as long as what is added to it."""
    generator = np.random.default_rng(0)
    centres = generator.standard_normal((max(1, num_rows // 1000), dim), np.float32)
    rows = centres[generator.integers(0, len(centres), num_rows)]
    for start in range(0, num_rows, 1 << 16):
        part = rows[start : start + (1 << 16)]
        part += generator.standard_normal(part.shape, np.float32) / 3
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--kinds", default="flat,ivfpq,hnsw")
    parser.add_argument("--threads", type=int, default=1, help="of searches")
    given = parser.parse_args()
    rows = some_vectors(given.rows, given.dim)
    words = [str(row) for row in range(given.rows)]
    read = lambda start, stop: rows[start:stop]  # noqa: E731
    vectors = Vectors("item", 1, given.rows, given.dim, words, None, read)
    queries = unit_rows(rows[np.random.default_rng(1).integers(0, given.rows, QUERIES)])
    for kind in given.kinds.split(","):
        faiss.omp_set_num_threads(2)
        start = time.perf_counter()
        index = build_index(vectors, kind)
        build_seconds = time.perf_counter() - start
        faiss.omp_set_num_threads(given.threads)
        num_queries = 100 if kind == "flat" else QUERIES
        start = time.perf_counter()
        for query in queries[:num_queries]:
            index.search(query[None], K)
        seconds = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            faiss.write_index(index._index, f"{folder}/index")
            num_bytes = Path(folder, "index").stat().st_size
        found = index.facts
        print(f"{kind:6} recall@20 {found.recall:.4f}, by the index alone {found.approximate_recall:.4f}", end="  ")
        print(f"{num_queries / seconds:,.0f} queries/s  built in {build_seconds:,.1f} s  {num_bytes:,} bytes")


if __name__ == "__main__":
    main()
