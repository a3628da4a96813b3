"""Writing recommendations to Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from embedtrain.errors import UserError
from embedtrain.export.storage import new_files, refuse_packed_name

Recommendation = tuple[str, Sequence[str], Sequence[float]]
"""The raw id of a user, the raw ids of its recommended items, best first, and their scores."""

_SCHEMA = pa.schema(
    [("user", pa.large_string()), ("items", pa.list_(pa.large_string())), ("scores", pa.list_(pa.float32()))]
)


_OTHER_SUFFIXES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")


def refuse_other_name(output: str) -> None:
    """Checks that the output's name is not that of a text file or a compressed file.

    Raises:
        UserError: the name ends in the suffix of a text format or of a compression.
    """
    if output.lower().endswith(_OTHER_SUFFIXES):
        raise UserError(f"--output {output} must end in .parquet: recommendations are written as Parquet")
    refuse_packed_name(output, "parquet")


def write_recommendations(batches: Iterable[Sequence[Recommendation]], output: str, *, overwrite: bool = False) -> None:
    """Writes a Parquet file with one row per user: `user`, `items` (best first) and their `scores`.

    Args:
        batches: batches of recommendations.
        output: path or fsspec URL of the new file; it appears when it is complete.
        overwrite: whether to replace an existing file.

    Raises:
        UserError: the output exists, cannot be written, or has the suffix of another format.
    """
    refuse_other_name(output)
    with new_files([output], overwrite) as (file,), pq.ParquetWriter(file, _SCHEMA) as writer:
        for batch in batches:
            users, items, scores = ([row[column] for row in batch] for column in range(3))
            writer.write_table(pa.table([users, items, scores], schema=_SCHEMA))
