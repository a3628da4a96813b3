"""Writes scores to a Parquet, CSV or JSON-lines file, or as lines to standard output."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from embedtrain.errors import UserError
from embedtrain.export.storage import new_files, vacant_place
from embedtrain.serve.scoring import Scored

SCORE = "probability"
"""Name of the score column; no kept column may have this name."""

_ROWS_PER_GROUP = 1 << 17

_Write = Callable[[pa.Table], None]


def require_output(output: str, *, overwrite: bool) -> None:
    """Checks the output's name before any work is done.

    Raises:
        UserError: the name does not end in `.parquet`, `.csv` or `.jsonl`, or the file exists.
    """
    if _suffix(output) not in _WRITERS:
        raise UserError(f"--output {output} must end in {', '.join(_WRITERS)}, or be - for standard output")
    vacant_place(output, overwrite=overwrite)


def write_scores(scored: Iterable[Scored], output: str, *, overwrite: bool = False) -> int:
    """Writes one row per scored row: the kept columns, and `probability` in float32.

    Args:
        scored: the rows.
        output: path or fsspec URL of the new file, which appears when it is complete; see `require_output`.
        overwrite: whether to replace an existing file.

    Returns:
        The number of rows.

    Raises:
        UserError: the output exists or cannot be written, or the format cannot hold a kept column.
    """
    num_rows = 0
    with new_files([output], overwrite) as (file,), _WRITERS[_suffix(output)](file) as write:
        for table in _tables(scored):
            write(table)
            num_rows += len(table)
        if num_rows == 0:
            write(pa.table({SCORE: pa.array([], pa.float32())}))
    return num_rows


def write_lines(scored: Iterable[Scored], file: BinaryIO, *, as_json: bool) -> None:
    """Writes one line per scored row and flushes after each part: JSON, or CSV without a header."""
    for part in scored:
        table = _table_of(part)
        if as_json:
            file.write(_json_lines(table))
        else:
            _write_csv(table, file, has_header=False)
        file.flush()


def _suffix(output: str) -> str:
    return os.path.splitext(output)[1].lower()


def _tables(scored: Iterable[Scored]) -> Iterator[pa.Table]:
    """Yields tables, all with the schema of the first one."""
    schema: pa.Schema | None = None
    for part in scored:
        table = _table_of(part)
        try:
            table = table if schema is None else table.cast(schema)
        except pa.ArrowException as error:
            raise UserError(f"a kept column has different types in different files: {error}") from error
        schema = table.schema
        yield table


def _table_of(part: Scored) -> pa.Table:
    columns = {name: part.kept.column(name) for name in part.kept.schema.names}
    return pa.table({**columns, SCORE: pa.array(part.probabilities, pa.float32())})


@contextmanager
def _parquet(file: BinaryIO) -> Iterator[_Write]:
    held: list[pa.Table] = []
    with ExitStack() as stack:
        writers: list[pq.ParquetWriter] = []

        def flush() -> None:
            if held and not writers:
                writers.append(stack.enter_context(pq.ParquetWriter(file, held[0].schema)))
            if held:
                writers[0].write_table(pa.concat_tables(held))
            held.clear()

        def write(table: pa.Table) -> None:
            held.append(table)
            if sum(map(len, held)) >= _ROWS_PER_GROUP:
                flush()

        yield write
        flush()


@contextmanager
def _csv(file: BinaryIO) -> Iterator[_Write]:
    has_header = True

    def write(table: pa.Table) -> None:
        nonlocal has_header
        _write_csv(table, file, has_header=has_header)
        has_header = False

    yield write


@contextmanager
def _jsonl(file: BinaryIO) -> Iterator[_Write]:
    yield lambda table: _discard(file.write(_json_lines(table)))


def _discard(_: Any) -> None:
    pass


_WRITERS = {".parquet": _parquet, ".csv": _csv, ".jsonl": _jsonl}


def _write_csv(table: pa.Table, file: BinaryIO, *, has_header: bool) -> None:
    odd = [field.name for field in table.schema if pa.types.is_nested(field.type) or pa.types.is_decimal(field.type)]
    if odd:
        raise UserError(
            f"CSV cannot hold the nested or decimal values of {', '.join(odd)}: write .parquet or .jsonl, or drop them"
        )
    # Arrow quotes every text or none, and raises ArrowInvalid if a text needs quotes.
    try:
        content = _as_csv(table, has_header, "none")
    except pa.ArrowInvalid:
        content = _as_csv(table, has_header, "needed")
    file.write(content)


def _as_csv(table: pa.Table, has_header: bool, quoting: str) -> memoryview:
    buffer = io.BytesIO()
    pa_csv.write_csv(table, buffer, pa_csv.WriteOptions(include_header=has_header, quoting_style=quoting))
    return buffer.getbuffer()


def _json_lines(table: pa.Table) -> bytes:
    return "".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in table.to_pylist()).encode()
