"""Reading named vectors from files of other programs, in blocks; the format is detected from the content."""

from __future__ import annotations

import functools
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedtrain.data.readers.blocks import BYTE_ORDER_MARK, open_unpacked, read_chunks
from embedtrain.data.readers.parquet import open_parquet
from embedtrain.data.readers.rows import plain
from embedtrain.data.sources import Source, expand_sources
from embedtrain.errors import UserError

FloatRows = NDArray[np.float32]
Places = NDArray[np.int64]

NAMES_SUFFIX = ".vocabulary.tsv"
"""Suffix of the file of names beside an array: `vectors.npy.vocabulary.tsv`."""

_HEAD_BYTES = 1 << 20
_BLOCK_BYTES = 8 << 20
_NO_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
"""Bytes that are rare in text: of random bytes, 40 % are one of these or invalid in UTF-8."""
_BORDER = re.compile(rb"[\t\n\v\f\r ]")
_FOREIGN = {
    b"PK\x03\x04": "a zip archive, such as npz",
    b"\x80": "a Python pickle",
    b"\xba\x16\x4f\x2f": "fastText's model (.bin)",
}
"""First bytes of unsupported files, and what they are."""
_MAX_HEADER_BYTES = 100 << 20
_VALUES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""NumPy dtypes of safetensors values; BF16 values are the upper halves of float32 values."""


@dataclass(frozen=True, eq=False)
class VectorBlock:
    """Holds consecutive vectors of a file.

    Attributes:
        names: names of the vectors.
        rows: returns the vectors [n, dim] at the given places [n] of `names`; other vectors are not parsed.
    """

    names: Sequence[str]
    rows: Callable[[Places], FloatRows]


def read_vectors(path: str, dim: int) -> Iterator[VectorBlock]:
    """Reads a file of named vectors, about 8 MiB at a time.

    Reads word2vec's text and binary formats, fastText's `.vec`, GloVe's text, npy and safetensors with their names
    beside them in `PATH.vocabulary.tsv` (one line per row: the name, optionally a tab and a count), compressed or
    not; and Parquet with the columns `word` and `vector`. The format is detected from the content; other formats are
    refused, and so are files whose number of vectors differs from their header. A name that word2vec cut within a
    character ends with U+FFFD.

    Args:
        path: the file, any fsspec URL.
        dim: expected dim of the vectors.

    Raises:
        UserError: there is no such file, it cannot be read, or its vectors have another dim.
    """
    sources = expand_sources([path])
    if len(sources) != 1:
        raise UserError(f"{path} must be one file of vectors, but matches {len(sources)}: name one of them")
    yield from _reader_of(sources[0], dim)(sources[0], dim)


def check_vectors(path: str, dim: int, key: str) -> None:
    """Opens a file of vectors and reads its first block.

    Raises:
        UserError: see `read_vectors`; the message names the key.
    """
    try:
        next(iter(read_vectors(path, dim)), None)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def _reader_of(source: Source, expected_dim: int) -> Callable[[Source, int], Iterator[VectorBlock]]:
    """Detects the format from the first bytes.

    Raises:
        UserError: the format is unknown.
    """
    with open_unpacked(source) as file:
        head = file.read(max(_HEAD_BYTES, 64 * expected_dim))
    if head.startswith(b"\x93NUMPY"):
        return _read_npy
    if head.startswith(b"PAR1"):
        return _read_parquet
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < _MAX_HEADER_BYTES:
        return _read_safetensors
    for begin, what in _FOREIGN.items():
        if head.startswith(begin):
            raise UserError(f"{source.url}: {what} is not a supported format of vectors: export them as one of these")
    header, _, rest = head.removeprefix(BYTE_ORDER_MARK).partition(b"\n")
    counts = _header_of(header, rest)
    number, line = _first_line(rest, 2) if counts is not None else _first_line(header + b"\n" + rest, 1)
    dim = len(line.split()) - 1 if counts is None else counts[1]
    if (not line and counts is not None) or _parsed([line.rsplit(maxsplit=dim)[-dim:]], dim) is not None:
        return _read_text
    if counts is not None and _is_binary(rest):
        return _read_binary
    raise UserError(
        f"{source.url}: line {number}: expected a name and {dim if counts else 'some'} numbers, got "
        f"{_shortened(line)}: the file is damaged, or not one of vectors"
    )


def _header_of(first: bytes, rest: bytes) -> tuple[int, int] | None:
    """Returns number of rows and dim from the header line of word2vec; None if the line is not a header."""
    counts = _counts_of(first)
    # In GloVe's format with vectors of one value, a line whose name is a number looks like a header.
    fields = _first_line(rest, 2)[1].split()
    if counts is not None and counts[1] != 1 and len(fields) == 2 and _parsed([fields[1:]], 1) is not None:
        return None
    return counts


def _first_line(text: bytes, number: int) -> tuple[int, bytes]:
    """Returns number and content of the first line that is not blank; empty content if there is none."""
    for at, line in enumerate(text.split(b"\n"), start=number):
        if line.strip():
            return at, line
    return number, b""


def _is_binary(data: bytes) -> bool:
    """Returns whether the bytes are not text."""
    if _NO_TEXT.search(data):
        return True
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason != "unexpected end of data"
    return False


def _shortened(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace")) + ("..." if len(line) > 60 else "")


def _read_text(source: Source, dim: int) -> Iterator[VectorBlock]:
    """Reads lines of a name and its values, after the optional header line of word2vec."""
    number, num_read = 0, 0
    counts: tuple[int, int] | None = None
    for chunk in read_chunks(source, 0, source.size_bytes, may_be_damaged=True):
        lines = chunk.removesuffix(b"\n").split(b"\n")
        if number == 0:
            counts = _header_of(lines[0], b"\n".join(lines[1:]))
            _require_dim(source, len(_first_line(chunk, 1)[1].split()) - 1 if counts is None else counts[1], dim)
            if counts is not None:
                number = 1
                del lines[0]
        fields = [_fields_of(line, dim) for line in lines]
        for at, parts in enumerate(fields):
            if 0 < len(parts) <= dim:
                raise UserError(
                    f"{source.url}: line {number + at + 1}: expected a name and {dim} values, got {len(parts)} fields: "
                    "the file is damaged, or not one of vectors"
                )
        numbers = [number + at + 1 for at, parts in enumerate(fields) if parts]
        fields = [parts for parts in fields if parts]
        if counts is not None and num_read + len(fields) > counts[0]:
            raise UserError(
                f"{source.url}: line {numbers[counts[0] - num_read]}: expected no more than {counts[0]:,} vectors, as "
                "its first line says: the file is damaged, or two were joined"
            )
        names = _decoded([parts[0] for parts in fields], source, numbers)
        values = functools.partial(_values_of_lines, source, fields, numbers, dim)
        yield VectorBlock(names, values)
        number += len(lines)
        num_read += len(fields)
    if counts is not None and num_read != counts[0]:
        raise UserError(
            f"{source.url}: expected {counts[0]:,} vectors, as its first line says, and it ends after {num_read:,} of "
            f"them, in line {number}: the file is cut off"
        )


def _fields_of(line: bytes, dim: int) -> list[bytes]:
    """Returns the name and the values of a line; None for a blank line.

    A name may contain spaces, as some names of GloVe do; it is empty if the line begins with a space.
    """
    fields = line.rsplit(maxsplit=dim)
    return [b"", *fields] if len(fields) == dim and line[:1] in (b" ", b"\t") else fields


def _values_of_lines(
    source: Source, fields: Sequence[list[bytes]], numbers: Sequence[int], dim: int, places: Places
) -> FloatRows:
    rows = _parsed([fields[place][1:] for place in places.tolist()], dim)
    if rows is None:
        bad = next(place for place in places.tolist() if _parsed([fields[place][1:]], dim) is None)
        raise UserError(f"{source.url}: line {numbers[bad]}: expected {dim} numbers after the name")
    return rows


def _read_binary(source: Source, dim: int) -> Iterator[VectorBlock]:
    """Reads the records of word2vec: the name, a space, `dim` float32 values, and optionally a line end."""
    with open_unpacked(source) as file:
        header, _, rest = file.read(max(_BLOCK_BYTES, 8 * dim)).partition(b"\n")
        num_rows, found = _counts_of(header) or (0, 0)
        _require_dim(source, found, dim)
        num_read, offset = 0, len(header) + 1
        while num_read < num_rows:
            block = file.read(max(_BLOCK_BYTES, 8 * dim))
            data, at = rest + block, 0
            names: list[bytes] = []
            places: list[int] = []
            values: list[bytes] = []
            while num_read + len(names) < num_rows:
                space = data.find(b" ", at)
                stop = space + 1 + 4 * dim
                if space < 0 or stop > len(data):
                    break
                names.append(data[at:space].lstrip(b"\n"))
                places.append(offset + at)
                values.append(data[space + 1 : stop])
                at = stop
            if not names:
                raise UserError(
                    f"{source.url}: expected {num_rows:,} vectors of dim {dim}, as its first line says, and cannot "
                    f"read those after {num_read:,}, from byte {offset} on: the file is cut off or damaged, or not one "
                    "of vectors"
                )
            for name, place in zip(names, places, strict=True):
                if _BORDER.search(name):
                    raise UserError(
                        f"{source.url}: byte {place}: expected a name and a space, got {_shortened(name)}: the file is "
                        "damaged, or its vectors have another dim than its first line says"
                    )
            yield VectorBlock(
                _decoded(names, source, places, "byte"), functools.partial(_values_of_records, values, dim)
            )
            rest, num_read, offset = data[at:], num_read + len(names), offset + at
        if (rest + file.read(_HEAD_BYTES)).strip():
            raise UserError(
                f"{source.url}: expected it to end after {num_rows:,} vectors, as its first line says, and it goes on "
                f"from byte {offset}: the file is damaged, or two were joined"
            )


def _values_of_records(values: Sequence[bytes], dim: int, places: Places) -> FloatRows:
    return np.frombuffer(b"".join(values[place] for place in places.tolist()), "<f4").reshape(-1, dim)


def _decoded(names: Sequence[bytes], source: Source, places: Sequence[int], unit: str = "line") -> list[str]:
    found = []
    for name, place in zip(names, places, strict=True):
        try:
            found.append(_decode_cut(name))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{source.url}: {unit} {place}: the name {_shortened(name)} is not UTF-8: the file is damaged, or not "
                "one of vectors"
            ) from error
    return found


def _decode_cut(name: bytes) -> str:
    """Decodes a name; word2vec cuts long names at a byte, possibly within a character."""
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise
        return name.decode(errors="replace")


def _read_npy(source: Source, dim: int) -> Iterator[VectorBlock]:
    with open_unpacked(source) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_by_columns, dtype = read(file)
        except ValueError as error:
            raise UserError(f"{source.url} is not a valid npy file: {error}") from error
        if is_by_columns or dtype.kind != "f":
            raise UserError(
                f"{source.url}: expected floating-point values, row by row, got {dtype}"
                f"{', column by column' if is_by_columns else ''}"
            )
        yield from _read_array(file, source, shape, dtype, dim)


def _read_safetensors(source: Source, dim: int) -> Iterator[VectorBlock]:
    """Reads the tensor `vectors`, or the only tensor.

    Source: https://huggingface.co/docs/safetensors/index#format
    """
    with open_unpacked(source) as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            tensors: dict[str, Any] = json.loads(file.read(header_bytes))
            tensors.pop("__metadata__", None)
            name = next(iter(tensors)) if len(tensors) == 1 else "vectors"
            found = tensors.get(name)
            shape, kind, start, stop = ([], "", 0, 0) if found is None else _place_of(found)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"{source.url} is not a valid safetensors file: {error!r}") from error
        if kind not in _VALUES:
            expected = f"a tensor 'vectors', or one alone, of {', '.join(_VALUES)}"
            held = ", ".join(f"{name} of {tensors[name].get('dtype')}" for name in sorted(tensors))
            raise UserError(f"{source.url}: expected {expected}; it holds {held or 'none'}")
        if stop - start != math.prod(shape) * np.dtype(_VALUES[kind]).itemsize:
            raise UserError(
                f"{source.url}: its first bytes say that the values {shape} of {kind} take {stop - start:,} bytes: the "
                "file is damaged"
            )
        while start > 0:  # Compressed files cannot seek.
            start -= len(file.read(min(start, _BLOCK_BYTES))) or start
        yield from _read_array(file, source, shape, np.dtype(_VALUES[kind]), dim)


def _place_of(tensor: dict[str, Any]) -> tuple[list[int], str, int, int]:
    """Returns the shape and the dtype of a tensor, and the first and last byte of its values."""
    shape = [operator.index(size) for size in tensor["shape"]]
    start, stop = map(operator.index, tensor["data_offsets"])
    if min([start, *shape]) < 0:
        raise ValueError(f"shape {shape} from {start} on")
    return shape, str(tensor["dtype"]), start, stop


def _read_array(
    file: IO[bytes], source: Source, shape: Sequence[int], dtype: np.dtype[Any], dim: int
) -> Iterator[VectorBlock]:
    """Reads the rows of an array from the current position of `file`, and their names from the file beside it."""
    if len(shape) != 2:
        raise UserError(f"{source.url} must hold an array [rows, dim], got shape {list(shape)}")
    _require_dim(source, shape[1], dim)
    num_read = 0
    for names in _name_blocks(source, shape[0], max(1, _BLOCK_BYTES // (dim * dtype.itemsize))):
        data = file.read(len(names) * dim * dtype.itemsize)
        num_read += len(names)
        if len(data) != len(names) * dim * dtype.itemsize:
            raise UserError(f"{source.url}: it ends before row {num_read:,} of {shape[0]:,}: it is cut off")
        values = np.frombuffer(data, dtype).reshape(-1, dim)
        yield VectorBlock(names, functools.partial(_values_of_array, values))


def _values_of_array(values: NDArray[Any], places: Places) -> FloatRows:
    rows = values[places]
    if rows.dtype.kind == "u":
        rows = (rows.astype("<u4") << 16).view("<f4")
    return rows.astype(np.float32)


def _name_blocks(source: Source, num_rows: int, block_rows: int) -> Iterator[list[str]]:
    """Yields the names of an array's rows, at most `block_rows` at a time."""
    name, chain, rest = source.url.partition("::")
    path = f"{name}{NAMES_SUFFIX}{chain}{rest}"
    try:
        (of_names,) = expand_sources([path])
    except UserError as error:
        raise UserError(f"{source.url} needs the names of its rows beside it, a line for each: {error}") from error
    num_names = 0
    for chunk in read_chunks(of_names, 0, of_names.size_bytes):
        lines = chunk.decode().removesuffix("\n").split("\n")
        names = [line.removesuffix("\r").partition("\t")[0] for line in lines]
        num_names += len(names)
        if num_names > num_rows:
            break
        yield from (names[at : at + block_rows] for at in range(0, len(names), block_rows))
    if num_names != num_rows:
        fault = "more" if num_names > num_rows else f"{num_names:,}"
        raise UserError(f"{source.url} has {num_rows:,} rows, and {path} {fault} names: they do not belong together")


def _read_parquet(source: Source, dim: int) -> Iterator[VectorBlock]:
    with open_parquet(source) as file:
        held = file.schema_arrow.names
        if not {"word", "vector"} <= set(held):
            raise UserError(f"{source.url}: expected the columns word and vector; it has {', '.join(held)}")
        for batch in file.iter_batches(max(1, _BLOCK_BYTES // (4 * dim)), columns=["word", "vector"]):
            vectors = plain(batch.column("vector"))
            for found in np.unique(np.asarray(pc.list_value_length(vectors).fill_null(0))).tolist():
                _require_dim(source, found, dim)
            values = np.asarray(pc.cast(pc.list_flatten(vectors), pa.float32())).reshape(-1, dim)
            names = plain(batch.column("word")).cast(pa.large_string()).fill_null("").to_pylist()
            yield VectorBlock(names, functools.partial(_values_of_array, values))


def _counts_of(line: bytes) -> tuple[int, int] | None:
    """Returns number of rows and dim from the header line of word2vec; None if the line is not a header."""
    fields = line.split()
    if len(fields) != 2 or not all(field.isdigit() and len(field) < 16 for field in fields):
        return None
    return int(fields[0]), int(fields[1])


def _parsed(rows: Sequence[list[bytes]], dim: int) -> FloatRows | None:
    """Parses the fields of each row into numbers [n, dim]; None if a field is not a number."""
    if any(len(fields) != dim for fields in rows):
        return None
    fields = pa.array([field for row in rows for field in row], pa.binary())
    try:
        values = pc.cast(fields.cast(pa.string()), pa.float32())
    except pa.ArrowInvalid:
        return None
    parsed: FloatRows = np.asarray(values, np.float32).reshape(len(rows), dim)
    return parsed


def _require_dim(source: Source, found: int, dim: int) -> None:
    if found != dim:
        raise UserError(
            f"{source.url}: expected vectors of dim {dim}, as the table's are, and found dim {found}: take another "
            f"file, or give the table dim {found}"
        )
