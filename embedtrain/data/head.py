"""The head of data: their first MiBs as files of their own, to try a run on."""

from __future__ import annotations

import os
from collections.abc import Sequence

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from embedtrain.data.sources import CHUNK_BYTES, Source, expand_sources, explained, read_chunks
from embedtrain.errors import UserError

_ROWS_PER_READ = 1 << 14


def write_head(path: str | Sequence[str], suffixes: tuple[str, ...], folder: str, max_bytes: int) -> list[str] | None:
    """Copies the first lines or rows of the files that a path means; returns the copies, None where that is all.

    Args:
        path: as `expand_sources` takes it.
        suffixes: of the files of a folder.
        folder: a local folder that exists, to write to.
        max_bytes: about how much text or Parquet to copy. Files that are not larger than that, all together, are
            not copied: they are their own head.

    Raises:
        UserError: as `expand_sources` and `read_chunks`, or a Parquet file cannot be read as one.
    """
    sources = expand_sources(path, suffixes)
    if sum(source.size_bytes for source in sources) <= max_bytes and not any(source.compression for source in sources):
        return None
    copies: list[str] = []
    left = max_bytes
    for number, source in enumerate(sources):
        if left <= 0:
            break
        name = os.path.basename(source.url)
        name = os.path.splitext(name)[0] if source.compression else name
        copies.append(os.path.join(folder, f"{number:05d}-{name}"))
        copy = _copy_parquet if name.endswith(".parquet") else _copy_text
        left -= copy(source, copies[-1], left)
    return copies


def _copy_text(source: Source, path: str, max_bytes: int) -> int:
    copied = 0
    with open(path, "wb") as file:
        for chunk in read_chunks(source, 0, source.size_bytes, chunk_bytes=min(CHUNK_BYTES, max_bytes)):
            file.write(chunk)
            copied += len(chunk)
            if copied >= max_bytes:
                break
    return copied


def _copy_parquet(source: Source, path: str, max_bytes: int) -> int:
    with explained(source), fsspec.open(source.url, "rb") as stored:
        try:
            rows = pq.ParquetFile(stored)
            with pq.ParquetWriter(path, rows.schema_arrow) as writer:
                for batch in rows.iter_batches(_ROWS_PER_READ):
                    writer.write_batch(batch)
                    if os.path.getsize(path) >= max_bytes:
                        break
        except pa.ArrowException as error:
            raise UserError(f"{source.url}: cannot be read as Parquet: {error}") from error
    return os.path.getsize(path)
