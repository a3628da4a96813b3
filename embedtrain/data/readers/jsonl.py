"""JSON lines: one object per line, whose keys name the columns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pa_json

from embedtrain.data.readers.blocks import Segment, read_records
from embedtrain.data.readers.rows import Layout, Parsed, TextFormat, Uses, plain
from embedtrain.data.sources import Source
from embedtrain.errors import UserError

_SAMPLE_LINES = 64
_ESCAPED_NUL = rb"\u0000"
_SECOND_VALUE = re.compile(rb"\}[ \t\r]*[{n]")
"""Finds a further value on the line of an object."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_TYPES = {bool: pa.bool_(), int: pa.int64(), float: pa.float64(), str: pa.large_string()}


class JsonLines(TextFormat):
    """Reads objects of strings, numbers, booleans and lists of these; an absent key is a missing value.

    Columns have the types of their values. A column with integers of more than 64 bits, or with both integers and
    strings, becomes a column of strings, so that ids keep their spelling. Booleans are numbers in the columns of
    `Uses.counted`. Columns of bags are lists: a value that is not a list is split like a CSV field.
    """

    suffixes = (".jsonl", ".ndjson")
    other_suffixes = (".json", ".txt", "")

    def columns(self, source: Source, names: Sequence[str], layout: Layout) -> tuple[str, ...]:
        """See `Format.columns`: the keys of the first block (about 4 MiB), or of more if one of `names` is missing."""
        found: dict[str, None] = {}
        wrong, number = "", 0
        for block in read_records(Segment(source), None):
            for line in block.removesuffix(b"\n").split(b"\n"):
                number += 1
                record = _record(line) if line.strip() else {}
                if isinstance(record, dict):
                    found.update(dict.fromkeys(record))
                else:
                    wrong = wrong or f":{number}: {record}"
            if found.keys() >= set(names):
                break
        if not found:
            raise UserError(f"{source.url}{wrong or ': expected lines of JSON objects, found none'}")
        return tuple(found)

    def nested_columns(self, source: Source, max_lines: int) -> set[str]:
        """Returns the keys whose values are objects, or lists of objects or lists, in the first lines."""
        found: set[str] = set()
        num_lines = 0
        for block in read_records(Segment(source), None):
            for line in block.split(b"\n"):
                record = _record(line) if line.strip() else ""
                if isinstance(record, dict):
                    found.update(name for name, value in record.items() if _is_nested(value))
            num_lines += block.count(b"\n")
            if num_lines >= max_lines:
                break
        return found

    def parse(
        self,
        block: bytes,
        names: Sequence[str],
        columns: tuple[str, ...],
        layout: Layout,
        uses: Uses,
    ) -> Parsed:
        """See `TextFormat.parse`; blank lines are no rows."""
        num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
        may_be_whole = _has_one_object_per_line(block, num_lines) and _ESCAPED_NUL not in block
        arrays = _parse_at_once(block, names, uses) if may_be_whole else None
        if arrays is None or len(arrays[0]) != num_lines:
            return _parse_line_by_line(block, names, num_lines, uses)
        return Parsed(_as_batch(names, arrays), num_lines)


def _has_one_object_per_line(block: bytes, num_lines: int) -> bool:
    """Returns whether each line holds exactly one object, provided that Arrow finds as many objects as lines.

    Arrow ignores line ends, and pyarrow 26 crashes if a block begins with null. If every line begins with an object and
    no line has a second value, then as many objects as lines means that each line is one object.
    """
    num_objects = block.count(b"\n{") + block.startswith(b"{")
    return num_objects == num_lines and _SECOND_VALUE.search(block) is None


def _parse_at_once(block: bytes, names: Sequence[str], uses: Uses) -> list[pa.Array] | None:
    """Parses a block whose values have the types of the first lines; None if some values have other types."""
    sample = list(map(_record, islice(filter(bytes.strip, block.split(b"\n", _SAMPLE_LINES)), _SAMPLE_LINES)))
    schema = [(name, _type_of([r.get(name) for r in sample if isinstance(r, dict)])) for name in names]
    if any(_is_refused(name, kind, uses) for name, kind in schema):
        return None
    try:
        table = pa_json.read_json(
            pa.BufferReader(block),
            read_options=pa_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pa_json.ParseOptions(
                explicit_schema=pa.schema(schema), newlines_in_values=False, unexpected_field_behavior="ignore"
            ),
        )
    except pa.ArrowInvalid:
        return None
    arrays = [table[name].combine_chunks() for name in names]
    arrays = [
        array.cast(pa.int64()) if pa.types.is_boolean(array.type) and name in uses.counted else array
        for name, array in zip(names, arrays, strict=True)
    ]
    return [
        _parted(array, uses.separators[name]) if name in uses.separators and not pa.types.is_list(array.type) else array
        for name, array in zip(names, arrays, strict=True)
    ]


def _is_refused(name: str, kind: pa.DataType, uses: Uses) -> bool:
    is_list = pa.types.is_list(kind)
    value = kind.value_type if is_list else kind
    return (is_list and name not in uses.separators) or (pa.types.is_floating(value) and name not in uses.numbers)


def _parse_line_by_line(block: bytes, names: Sequence[str], num_lines: int, uses: Uses) -> Parsed:
    """Parses lines one by one, if some are blank or bad, or a column has several types."""
    values: dict[str, list[Any]] = {name: [] for name in names}
    wrong: dict[int, str] = {}
    rows: list[int] = []
    for number, line in enumerate(block.removesuffix(b"\n").split(b"\n")):
        if not line.strip():
            continue
        record = _record(line)
        fault = record if isinstance(record, str) else _fault_of(record, names, uses)
        if fault is not None:
            wrong[number] = fault
            continue
        rows.append(number)
        for name in names:
            value = record.get(name)  # type: ignore[union-attr]
            if name in uses.counted:
                value = _counted(value)
            is_whole = name not in uses.separators or value is None or isinstance(value, list)
            values[name].append(value if is_whole else _part(value, uses.separators[name]))
    arrays = [_as_array(values[name]) for name in names]
    lines = np.array(rows, np.int64)
    return Parsed(_as_batch(names, arrays), num_lines, wrong, lambda: lines)


def _as_batch(names: Sequence[str], arrays: Sequence[pa.Array]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([plain(array) for array in arrays], names=list(names))


def _record(line: bytes) -> dict[str, Any] | str:
    """Returns the object of a line, or the reason why the line is bad."""
    try:
        record = json.loads(line, object_pairs_hook=_object)
        if _SURROGATE.search(line):
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "not a JSON object: half of a surrogate pair stands alone"
    except ValueError as error:
        return f"not a JSON object: {error}"
    except RecursionError:
        return "not a JSON object that can be read: it is nested too deeply"
    return record if isinstance(record, dict) else f"expected a JSON object, got {type(record).__name__}"


class _Object(dict[str, Any]):
    """An object with repeated keys."""

    repeated: frozenset[str] = frozenset()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    repeating = _Object(record)
    keys = [key for key, _ in pairs]
    repeating.repeated = frozenset(key for key in record if keys.count(key) > 1)
    return repeating


def _fault_of(record: dict[str, Any] | str, names: Sequence[str], uses: Uses) -> str | None:
    assert isinstance(record, dict)
    repeated = record.repeated if isinstance(record, _Object) else frozenset[str]()
    for name in names:
        if name in repeated:
            return f"column {name}: the key is repeated"
        value = record.get(name)
        if isinstance(value, list) and name not in uses.separators:
            return f"column {name}: expected one value, since the column is no bag, got {json.dumps(value)}"
        if _is_nested(value):
            return f"column {name}: expected a string, a number or a list of these, got {json.dumps(value)}"
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, float) and name not in uses.numbers:
                return f"column {name}: expected integers or strings, got the floating-point number {json.dumps(each)}"
            if isinstance(each, str) and "\0" in each:
                return f"column {name}: the text {json.dumps(each)} holds NUL"
    return None


def _is_nested(value: Any) -> bool:
    """Returns whether a value is an object, or a list of objects or lists."""
    return isinstance(value, dict) or (isinstance(value, list) and any(isinstance(each, dict | list) for each in value))


def _parted(column: pa.Array, separator: str | None) -> pa.Array:
    """Returns a column of single values as bags; see `_part`."""
    texts = column.cast(pa.large_string())
    is_value = pc.not_equal(pc.utf8_trim_whitespace(texts), "").fill_null(False)
    if separator is not None:
        return pc.split_pattern(pc.if_else(is_value, texts, None), separator)
    ends = np.cumsum(is_value.to_numpy(zero_copy_only=False))
    return pa.LargeListArray.from_arrays(pa.array(np.append(0, ends), pa.int64()), texts.filter(is_value))


def _counted(value: Any) -> Any:
    """Returns a value or a list with true replaced by 1 and false by 0."""
    if isinstance(value, list):
        return [_counted(each) for each in value]
    return int(value) if isinstance(value, bool) else value


def _part(value: Any, separator: str | None) -> list[str]:
    """Returns the bag of a value that is not a list: its text split at separators, as in CSV, or the value alone."""
    text = _spelled(value) or ""
    if not text.strip():
        return []
    return [text] if separator is None else text.split(separator)


def _type_of(values: list[Any]) -> pa.DataType:
    """Infers the type of a column from some of its values."""
    if any(isinstance(value, list) for value in values):
        lists = [each for value in values if isinstance(value, list) for each in value]
        return pa.list_(_type_of_single(lists))
    return _type_of_single(values)


def _type_of_single(values: list[Any]) -> pa.DataType:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.float64()
    return _TYPES.get(kinds.pop(), pa.large_string()) if len(kinds) == 1 else pa.large_string()


def _as_array(values: list[Any]) -> pa.Array:
    kind = _type_of(values)
    try:
        return pa.array(values, kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        if not pa.types.is_list(kind):
            return pa.array(map(_spelled, values), pa.large_string())
        texts = [value if value is None else list(map(_spelled, value)) for value in values]
        return pa.array(texts, pa.list_(pa.large_string()))


def _spelled(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
