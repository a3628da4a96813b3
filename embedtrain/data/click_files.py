"""Reads the files of a click log: which parts they divide into, and the rows of a part with their line numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedtrain.data.click_schema import ClickSchema, FileFormat, require_columns
from embedtrain.data.prepare import Segment, plan_parts
from embedtrain.data.sources import CHUNK_BYTES, Source, read_chunks
from embedtrain.errors import UserError

SUFFIXES: dict[FileFormat, tuple[str, ...]] = {
    "csv": (".csv", ".tsv", ".txt", ".gz", ".zst", ".bz2"),
    "criteo": (".tsv", ".txt", ".gz", ".zst", ".bz2"),
    "parquet": (".parquet",),
}
"""What the files of a folder end in."""

_ROWS_PER_READ = 1 << 15
_MAX_PARTS = 256  # Each becomes a file that is held open while it is mapped.


@dataclass(frozen=True)
class ClickFiles:
    """The parts of a click log, which do not depend on the number of ranks.

    Attributes:
        parts: in order; each is a list of segments: bytes of a text file, row groups of a Parquet file.
        columns: the names of each source's columns, by URL.
    """

    parts: list[list[Segment]]
    columns: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Fault:
    """A line that cannot be used.

    Attributes:
        segment: where it lies.
        line: its number in the segment, from 0.
        reason: what is wrong with it.
    """

    segment: Segment
    line: int
    reason: str


@dataclass(frozen=True)
class RawRows:
    """Some rows as they stand in a file.

    Attributes:
        table: the columns of the schema that are used.
        lines: [num_rows] int64; the rows' numbers in their segment, from 0.
    """

    table: pa.Table
    lines: NDArray[np.int64]


def plan_files(sources: Sequence[Source], schema: ClickSchema, part_bytes: int) -> ClickFiles:
    """Divides files into parts and makes sure that each holds the schema's columns.

    Raises:
        UserError: a file lacks a column, or is not of the schema's format.
    """
    columns = {source.url: _columns_of(source, schema) for source in sources}
    for url, names in columns.items():
        require_columns(schema.used_columns, names, url)
    if schema.file_format == "parquet":
        return ClickFiles(_plan_row_groups(sources, part_bytes), columns)
    return ClickFiles(plan_parts(sources, part_bytes), columns)


def read_rows(
    segment: Segment, schema: ClickSchema, columns: tuple[str, ...], faults: list[Fault], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[RawRows]:
    """Reads a segment, a few MiB at a time; lines that do not have the right number of fields go to `faults`.

    Raises:
        UserError: the file cannot be read as what it should be.
    """
    if schema.file_format == "parquet":
        yield from _read_parquet(segment, schema)
        return
    at = 0
    for chunk in read_chunks(segment.source, segment.start, segment.stop, chunk_bytes=chunk_bytes):
        num_lines = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
        if at == 0 and segment.start == 0 and schema.columns is None:
            chunk, at, num_lines = chunk.partition(b"\n")[2], 1, num_lines - 1
        if num_lines:
            rows, wrong = parse_text(chunk, schema, columns, segment.source.url)
            faults += [Fault(segment, at + line, reason) for line, reason in wrong.items()]
            yield RawRows(rows.table, at + rows.lines)
        at += num_lines


def describe_fault(fault: Fault, schema: ClickSchema) -> str:
    """Names the file and the line, counted from 1, as an editor does; for Parquet the row, counted from 0."""
    segment = fault.segment
    if schema.file_format == "parquet":
        with _opened_parquet(segment.source) as file:
            before = sum(file.metadata.row_group(group).num_rows for group in range(segment.start))
        return f"{segment.source.url}, row {before + fault.line}: {fault.reason}"
    before = 0
    if segment.start > 0:
        before = sum(chunk.count(b"\n") for chunk in read_chunks(segment.source, 0, segment.start))
    return f"{segment.source.url}:{before + fault.line + 1}: {fault.reason}"


def _columns_of(source: Source, schema: ClickSchema) -> tuple[str, ...]:
    if schema.file_format == "parquet":
        with _opened_parquet(source) as file:
            return tuple(file.schema_arrow.names)
    if schema.columns is not None:
        return schema.columns
    chunk = next(read_chunks(source, 0, source.size_bytes if source.compression else 1), b"")
    if not chunk.strip():
        raise UserError(f"{source.url}: the file is empty, and its first line should name the columns")
    first_line = chunk.partition(b"\n")[0].decode()
    names = tuple(name.strip() for name in next(csv.reader([first_line], delimiter=schema.delimiter)))
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{source.url}: the first line names {', '.join(repeated)} more than once")
    return names


def _plan_row_groups(sources: Sequence[Source], part_bytes: int) -> list[list[Segment]]:
    groups: list[tuple[Segment, int]] = []
    for source in sources:
        with _opened_parquet(source) as file:
            metadata = file.metadata
            groups += [
                (Segment(source, group, group + 1), metadata.row_group(group).total_byte_size)
                for group in range(metadata.num_row_groups)
            ]
    part_bytes = max(part_bytes, -(-sum(size for _, size in groups) // _MAX_PARTS))
    parts: list[list[Segment]] = []
    room_bytes = 0
    for segment, size in groups:
        if room_bytes <= 0:
            parts.append([])
            room_bytes = part_bytes
        parts[-1].append(segment)
        room_bytes -= size
    return parts


def _read_parquet(segment: Segment, schema: ClickSchema) -> Iterator[RawRows]:
    at = 0
    with _opened_parquet(segment.source) as file:
        groups = list(range(segment.start, segment.stop))
        for batch in file.iter_batches(_ROWS_PER_READ, groups, list(schema.used_columns), use_threads=False):
            yield RawRows(pa.Table.from_batches([batch]), np.arange(at, at + batch.num_rows))
            at += batch.num_rows


@contextmanager
def _opened_parquet(source: Source) -> Iterator[pq.ParquetFile]:
    try:
        with fsspec.open(source.url, "rb") as file, pq.ParquetFile(file) as parquet:
            yield parquet
    except FileNotFoundError as error:
        raise UserError(f"{source.url}: the file has vanished since it was listed") from error
    except pa.ArrowException as error:
        raise UserError(f"{source.url}: cannot be read as Parquet: {error}") from error


def parse_text(
    chunk: bytes, schema: ClickSchema, columns: tuple[str, ...], where: str
) -> tuple[RawRows, dict[int, str]]:
    """Parses whole lines; blank ones do not count as rows.

    Args:
        chunk: the lines.
        schema: what to read of them.
        columns: the names of all their columns.
        where: what they are of, for messages.

    Returns:
        The rows, and by line what is wrong with those that do not have the right number of fields.

    Raises:
        UserError: a quoted field holds a line break.
    """
    wrong: dict[int, str] = {}

    def leave_out(row: pa_csv.InvalidRow) -> str:
        wrong[row.number - 1] = f"expected {row.expected_columns} fields, got {row.actual_columns}"
        return "skip"

    used = schema.used_columns
    table = pa_csv.read_csv(
        io.BytesIO(chunk),
        read_options=pa_csv.ReadOptions(use_threads=False, column_names=list(columns), block_size=len(chunk) + 1),
        parse_options=pa_csv.ParseOptions(
            delimiter=schema.delimiter,
            quote_char='"' if schema.file_format == "csv" else False,
            ignore_empty_lines=False,
            invalid_row_handler=leave_out,
        ),
        convert_options=pa_csv.ConvertOptions(
            include_columns=list(used), column_types={name: pa.large_string() for name in used}
        ),
    )
    is_blank = _blank_lines(chunk)
    if table.num_rows + len(wrong) != len(is_blank):
        raise UserError(
            f"{where}: a quoted field holds a line break, which is not supported: "
            f"{len(is_blank)} lines were read as {table.num_rows + len(wrong)} rows"
        )
    lines = np.setdiff1d(np.arange(len(is_blank)), np.fromiter(wrong, np.int64, len(wrong)))
    is_row = ~is_blank[lines]
    rows = RawRows(table if is_row.all() else table.filter(pa.array(is_row)), lines[is_row])
    return rows, {line: reason for line, reason in wrong.items() if not is_blank[line]}


def _blank_lines(chunk: bytes) -> NDArray[np.bool_]:
    """Tells for each line whether it holds nothing."""
    ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
    if not chunk.endswith(b"\n"):
        ends = np.append(ends, len(chunk))
    lengths = np.diff(ends, prepend=-1) - 1
    is_blank: NDArray[np.bool_] = lengths == 0
    for line in np.flatnonzero(lengths == 1):
        is_blank[line] = chunk[ends[line] - 1] == ord("\r")
    return is_blank
