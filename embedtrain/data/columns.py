"""Columns of texts and ids from files of rows: CSV, TSV, Parquet and `user item item ...` lines, on any fsspec URL."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from embedtrain.data.sources import Source, expand_sources, explained, read_chunks
from embedtrain.errors import UserError

_FORMATS = {".txt": "lines", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet"}
_SEPARATORS = {"csv": ",", "tsv": "\t"}
_PACKED = (".gz", ".bz2", ".zst")
TABLE_SUFFIXES = (*_FORMATS, *(f"{name}{packed}" for name in (".txt", ".csv", ".tsv") for packed in _PACKED))

Columns = list[pa.Array]
"""An array a column: large_string, or a list of large_string; all of one length."""


def read_columns(path: str | Sequence[str], format: str, names: Sequence[str]) -> Iterator[Columns]:
    """Reads columns of all files that a path means, some rows at a time.

    Every id and category is read as text, so that none is rounded or overflows, whatever its size: the digits of
    an integer, a string as it stands.

    Args:
        path: as `expand_sources` takes it.
        format: "lines", "csv", "tsv", "parquet", or "auto" to go by each file's suffix.
        names: of the columns; in "lines" the first names the users and the second the items.

    Yields:
        For each of `names` an array; its lists only where a column of Parquet holds lists.

    Raises:
        UserError: a file cannot be read as its format says, lacks a column, or a column holds no ids: the message
            names the file, and what was there instead.
    """
    for source in expand_sources(path, TABLE_SUFFIXES):
        kind = _format_of(source) if format == "auto" else format
        with _explained_format(source):
            if kind == "lines":
                yield from _read_lines(source)
            elif kind == "parquet":
                yield from _read_parquet(source, names)
            else:
                yield from _read_csv(source, kind, names)


def _format_of(source: Source) -> str:
    name = source.url.removesuffix(os.path.splitext(source.url)[1]) if source.compression else source.url
    suffix = os.path.splitext(name)[1]
    if suffix not in _FORMATS:
        raise UserError(
            f"{source.url}: cannot tell the format by the name: expected it to end in {', '.join(_FORMATS)}, "
            "or a format of lines, csv, tsv or parquet"
        )
    return _FORMATS[suffix]


def _read_lines(source: Source) -> Iterator[Columns]:
    rest = b""
    for chunk in read_chunks(source, 0, source.size_bytes):
        # A line longer than a chunk comes in pieces.
        whole, newline, after = (rest + chunk).rpartition(b"\n")
        rest = after if newline else rest + chunk
        if newline:
            yield _split_lines(whole)
    if rest:
        yield _split_lines(rest)


def _split_lines(text: bytes) -> Columns:
    lines = pa.array(text.split(b"\n"), pa.large_binary()).cast(pa.large_string())
    words = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(lines))
    lengths = np.asarray(pc.list_value_length(words))
    values = words.flatten()
    is_first = np.zeros(len(values), bool)
    starts = np.cumsum(lengths) - lengths
    # An empty line splits into one empty word.
    is_first[starts] = True
    users = values.filter(pa.array(is_first))
    of_line = np.repeat(np.arange(len(lengths)), np.maximum(lengths - 1, 0))
    return [users.take(pa.array(of_line)), values.filter(pa.array(~is_first))]


def _read_csv(source: Source, kind: str, names: Sequence[str]) -> Iterator[Columns]:
    parse = pa.csv.ParseOptions(delimiter=_SEPARATORS[kind])
    with _open_csv(source, parse_options=parse) as reader:
        found = reader.schema.names
    _require_columns(source, names, found)
    convert = pa.csv.ConvertOptions(
        include_columns=list(dict.fromkeys(names)),
        column_types={name: pa.large_string() for name in names},
        strings_can_be_null=True,
        null_values=[""],
    )
    with _open_csv(source, parse_options=parse, convert_options=convert) as reader:
        for batch in reader:
            yield [batch.column(name) for name in names]


def _read_parquet(source: Source, names: Sequence[str]) -> Iterator[Columns]:
    with _open(source) as raw, pq.ParquetFile(raw) as file:
        _require_columns(source, names, file.schema_arrow.names)
        for batch in file.iter_batches(columns=list(dict.fromkeys(names))):
            yield [_as_text(source, name, batch.column(name)) for name in names]


def _as_text(source: Source, name: str, column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        return column.cast(pa.large_list(_text_type(source, name, column.type.value_type)))
    return column.cast(_text_type(source, name, column.type))


def _text_type(source: Source, name: str, found: pa.DataType) -> pa.DataType:
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
    if not any(is_kind(found) for is_kind in kinds):
        raise UserError(
            f"{source.url}: column {name!r} holds {found}: expected integers or strings"
            + (", since a floating-point number cannot hold every 64-bit id" if pa.types.is_floating(found) else "")
        )
    return pa.large_string()


def _require_columns(source: Source, names: Sequence[str], found: Sequence[str]) -> None:
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{source.url}: there is no column {', '.join(map(repr, missing))}; its columns are "
            f"{', '.join(map(repr, found))}"
        )


@contextmanager
def _open(source: Source) -> Iterator[BinaryIO]:
    fs, path = fsspec.core.url_to_fs(source.url)
    with fs.open(path, "rb") as file:
        yield file


@contextmanager
def _open_csv(source: Source, **options: Any) -> Iterator[Any]:
    with _open(source) as file:
        stream = pa.input_stream(file, compression=source.compression)
        with pa.csv.open_csv(stream, **options) as reader:
            yield reader


@contextmanager
def _explained_format(source: Source) -> Iterator[None]:
    """As `explained`, for what pyarrow says of a file's content too."""
    try:
        with explained(source):
            yield
    except (pa.ArrowInvalid, pa.ArrowException) as error:
        raise UserError(f"{source.url}: {' '.join(str(error).split())}") from error
