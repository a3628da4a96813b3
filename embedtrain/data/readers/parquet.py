"""Parquet: typed columns, read one row group at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedtrain.data.readers.blocks import MAX_PARTS, Segment, open_seekable
from embedtrain.data.readers.rows import Fault, Format, Layout, Rows, Uses, plain, refuse_repeats
from embedtrain.data.sources import CHUNK_BYTES, Source
from embedtrain.errors import UserError

_ROWS_PER_READ = 1 << 15


class Parquet(Format):
    """Reads row groups; line numbers of rows and faults are row numbers."""

    suffixes = (".parquet",)
    other_suffixes = (".pq", "")

    def columns(self, source: Source, names: Sequence[str], layout: Layout) -> tuple[str, ...]:
        """See `Format.columns`."""
        with open_parquet(source) as file:
            found = tuple(file.schema_arrow.names)
        refuse_repeats(found, source)
        return found

    def plan(self, sources: Sequence[Source], part_bytes: int, undivided: Collection[str]) -> list[list[Segment]]:
        """See `Format.plan`."""
        groups: list[tuple[Segment, int]] = []
        for source in sources:
            with open_parquet(source) as file:
                metadata = file.metadata
                groups += [
                    (Segment(source, group, group + 1), metadata.row_group(group).total_byte_size)
                    for group in range(metadata.num_row_groups)
                ]
        part_bytes = max(part_bytes, -(-sum(size for _, size in groups) // MAX_PARTS))
        parts: list[list[Segment]] = []
        room_bytes = 0
        for segment, size in groups:
            if room_bytes <= 0:
                parts.append([])
                room_bytes = part_bytes
            parts[-1].append(segment)
            room_bytes -= size
        return parts

    def read(
        self,
        segment: Segment,
        names: Sequence[str],
        columns: tuple[str, ...],
        layout: Layout,
        faults: list[Fault],
        *,
        chunk_bytes: int = CHUNK_BYTES,
        uses: Uses,
    ) -> Iterator[Rows]:
        """See `Format.read`."""
        at = 0
        with open_parquet(segment.source) as file:
            groups = list(range(segment.start, min(segment.stop, file.metadata.num_row_groups)))
            for batch in file.iter_batches(_ROWS_PER_READ, groups, list(names), use_threads=False):
                arrays = [_typed(plain(batch.column(name))) for name in names]
                for name, array in zip(names, arrays, strict=True):
                    if (wrong := _wrong_text(array)) is not None:
                        row, reason = wrong
                        place = self.place(Fault(segment, at + row, reason))
                        raise UserError(f"{place}: column {name!r} holds {reason}")
                if batch.num_rows:
                    yield Rows(pa.RecordBatch.from_arrays(arrays, names=list(names)), at)
                at += batch.num_rows

    def place(self, fault: Fault) -> str:
        """See `Format.place`."""
        segment = fault.segment
        with open_parquet(segment.source) as file:
            before = sum(file.metadata.row_group(group).num_rows for group in range(segment.start))
        return f"{segment.source.url}, row {before + fault.line}"

    def copy_head(self, source: Source, path: str, layout: Layout, max_bytes: int) -> int:
        """See `Format.copy_head`."""
        with open_parquet(source) as file, pq.ParquetWriter(path, file.schema_arrow) as writer:
            for batch in file.iter_batches(_ROWS_PER_READ // 2):
                writer.write_batch(batch)
                if os.path.getsize(path) >= max_bytes:
                    break
        return os.path.getsize(path)


def _typed(column: pa.Array) -> pa.Array:
    """Returns a column; a column of type null (without any value) becomes a column of missing texts."""
    if pa.types.is_null(column.type):
        return column.cast(pa.large_string())
    if pa.types.is_large_list(column.type) and pa.types.is_null(column.type.value_type):
        return column.cast(pa.large_list(pa.large_string()))
    return column


def _wrong_text(column: pa.Array) -> tuple[int, str] | None:
    """Returns the first row of a plain column whose text is not UTF-8 or contains NUL, and the reason."""
    texts = pc.list_flatten(column) if pa.types.is_large_list(column.type) else column
    if not pa.types.is_large_string(texts.type) or not len(texts):
        return None
    if not _is_valid(texts):
        at = next(number for number in range(len(texts)) if not _is_valid(texts.slice(number, 1)))
        reason = "bytes that are not UTF-8 text"
    else:
        _, offsets, content = texts.buffers()
        bounds = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
        # Checking all bytes at once is much faster than checking each text; bytes of missing values do not count.
        if bounds[0] == bounds[-1] or np.frombuffer(content, np.uint8)[bounds[0] : bounds[-1]].min():
            return None
        holding = np.flatnonzero(pc.match_substring(texts, "\0").fill_null(False))
        if not len(holding):
            return None
        at, reason = int(holding[0]), "NUL, which no text may"
    return (at if texts is column else pc.list_parent_indices(column)[at].as_py()), reason


def _is_valid(texts: pa.Array) -> bool:
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


@contextmanager
def open_parquet(source: Source) -> Iterator[pq.ParquetFile]:
    """Opens a file.

    Raises:
        UserError: it is not one of Parquet, is damaged, may not be read or has vanished.
    """
    with open_seekable(source) as file:
        try:
            with pq.ParquetFile(file) as parquet:
                yield parquet
        except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
            # A damaged page raises OSError without errno; a failing disk or network sets errno or raises another class.
            if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
                raise
            raise UserError(f"{source.url} is not a valid Parquet file: {' '.join(str(error).split())}") from error
