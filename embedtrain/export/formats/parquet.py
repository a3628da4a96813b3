"""The format parquet: one row per word, for data frames and databases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from embedtrain.export.vectors import Vectors


def write_parquet(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes the columns `word`, `count` (if known) and `vector`, a list of `dim` float32 values."""
    (file,) = files
    fields = [("word", pa.string()), ("count", pa.int64()), ("vector", pa.list_(pa.float32(), vectors.dim))]
    schema = pa.schema([field for field in fields if field[0] != "count" or vectors.counts is not None])
    with pq.ParquetWriter(file, schema) as writer:
        for start, rows in vectors.blocks():
            stop = start + len(rows)
            columns = {
                "word": pa.array(vectors.words[start:stop], pa.string()),
                "vector": pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), vectors.dim),
            }
            if vectors.counts is not None:
                columns["count"] = pa.array(vectors.counts[start:stop])
            writer.write_table(pa.table(columns, schema=schema))
