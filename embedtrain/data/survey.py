"""Surveying files of rows: infers what their columns hold from the first rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from embedtrain.data.readers import AUTO, FORMATS, Fault, Format, Layout, format_of, suffixes_of
from embedtrain.data.readers.csv import Csv
from embedtrain.data.readers.jsonl import JsonLines
from embedtrain.data.readers.parquet import Parquet, open_parquet
from embedtrain.data.readers.rows import Uses, plain, plain_type
from embedtrain.data.sources import Source, expand_sources
from embedtrain.errors import UserError

MAX_ROWS = 100_000
_PART_BYTES = 4 << 20
_OTHER_DELIMITERS = ";\t|"
_BAG_SEPARATORS = "|;"
_BAG_SHARE = 0.2
"""Minimum share of texts with a separator for a column to count as bags."""
_FEW_OTHERS = 3
"""Maximum number of distinct texts in a column that otherwise holds numbers."""
_NUMBER = r"\s*[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?\s*"
_INTEGER = r"\s*[-+]?\d+\s*"
_TIMES = "times, which only data.time_column takes: cast them to texts to use them otherwise"
_MISSING = ("", "na", "n/a", "nan", "null", "none", "nil", "?", "-", ".", "\\n", "missing", "unknown")
"""Common spellings of a missing value, in lower case."""


@dataclass(frozen=True)
class Column:
    """Describes a column in the first rows.

    Attributes:
        name: name of the column.
        kind: "list" for columns of lists; "number" and "integer" if every value can be parsed as one.
        num_missing: number of rows without a value.
        counts: how often each value (of bags: each element) occurs, most frequent first.
        least, greatest: range of numbers.
        separator: separator that splits many texts into several values; None if there is none.
        strange: the few texts in a column of numbers, with their counts; else empty.
    """

    name: str
    kind: Literal["integer", "number", "text", "list"]
    num_missing: int
    counts: Sequence[tuple[str, int]]
    least: float = 0.0
    greatest: float = 0.0
    separator: str | None = None
    strange: Sequence[tuple[str, int]] = ()

    @property
    def is_bag(self) -> bool:
        """Whether the column holds bags."""
        return self.kind == "list" or self.separator is not None

    @property
    def num_values(self) -> int:
        """Number of distinct values."""
        return len(self.counts)


@dataclass(frozen=True)
class Survey:
    """Describes the first rows of files.

    Attributes:
        format: name of the format.
        layout: layout of text lines.
        has_names: whether the first line names the columns; else they are named c1, c2 and so on.
        num_rows: number of rows read.
        is_all: whether these are all rows of the files.
        columns: the columns in order.
        times: names of the Parquet columns of dates or times, which are not among `columns`.
        num_bad: number of bad lines among these rows, not counted in `num_rows`.
        remarks: a line of text per column left out, and one about bad lines.
    """

    format: str
    layout: Layout
    has_names: bool
    num_rows: int
    is_all: bool
    columns: Sequence[Column]
    times: Sequence[str] = ()
    num_bad: int = 0
    remarks: Sequence[str] = ()


def survey(path: str | Sequence[str]) -> Survey:
    """Surveys the first rows, about `MAX_ROWS` at most, of the first file.

    Raises:
        UserError: the file does not exist, its suffix is unknown, or its rows have no columns.
    """
    sources = expand_sources(path, suffixes_of(AUTO))
    reader = format_of(sources[0], AUTO)
    if not reader.has_names:
        raise UserError(f"{sources[0].url}: lines of `user item item ...` have no columns with names")
    layout, has_names = _layout_of(reader, sources[0]) if isinstance(reader, Csv) else (Layout(), True)
    existing = reader.columns(sources[0], (), layout)
    left_out = _left_out(reader, sources[0], existing)
    names = [name for name in existing if name and name not in left_out]
    batches: list[pa.RecordBatch] = []
    faults: list[Fault] = []
    num_rows, is_all = 0, len(sources) == 1
    for batch in _batches(reader, sources[0], names, existing, layout, faults) if names else ():
        if num_rows >= MAX_ROWS:
            is_all = False
            break
        batches.append(batch)
        num_rows += batch.num_rows
    remarks = [f"left out: {name}, which holds {what}" for name, what in left_out.items()]
    remarks += [f"left out: column {place}, which has no name" for place, name in enumerate(existing, 1) if not name]
    if faults:
        lines = "1 line that cannot be read" if len(faults) == 1 else f"{len(faults):,} lines that cannot be read"
        remarks.append(f"left out: {lines}; {reader.place(faults[0])}: {faults[0].reason}")
    if not num_rows:
        raise UserError("; ".join([f"{sources[0].url} has no usable rows", *remarks]))
    columns = []
    for name in names:
        values = pa.concat_arrays([plain(batch.column(name)) for batch in batches])
        if isinstance(reader, JsonLines) and pa.types.is_large_list(values.type):
            values = _unwrapped(values)
        elif isinstance(reader, Csv):
            values = pc.utf8_trim_whitespace(values)  # Parsed like the values of a click log.
        if pa.types.is_large_list(values.type) and _has_fraction(values.type.value_type):
            remarks.append(f"left out: {name}, which holds lists of numbers with fractions")
            continue
        # In Parquet a bag is a list, so texts are not split.
        columns.append(_column(name, values, "" if isinstance(reader, Parquet) else _BAG_SEPARATORS))
    format = next(key for key, value in FORMATS.items() if value is reader)
    times = [name for name, what in left_out.items() if what == _TIMES]
    return Survey(format, layout, has_names, num_rows, is_all, columns, times, len(faults), remarks)


def _left_out(reader: Format, source: Source, names: Sequence[str]) -> dict[str, str]:
    """Returns the columns that no model can use, and what they hold."""
    if isinstance(reader, JsonLines):
        found = reader.nested_columns(source, MAX_ROWS)
        return {name: "objects" for name in names if name in found}
    if isinstance(reader, Parquet):
        with open_parquet(source) as file:
            held = {field.name: _unusable(plain_type(field.type)) for field in file.schema_arrow}
        return {name: what for name, what in held.items() if what is not None}
    return {}


def _unusable(kind: pa.DataType) -> str | None:
    """Returns what a Parquet column holds if it is not texts, numbers or lists of these; else None."""
    value = kind.value_type if pa.types.is_large_list(kind) else kind
    if pa.types.is_nested(value):
        return "objects"
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _TIMES
    tests = (pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_large_string, _has_fraction)
    return None if any(test(value) for test in tests) else f"values of type {value}: cast them to texts to use them"


def _has_fraction(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _batches(
    reader: Format,
    source: Source,
    names: Sequence[str],
    existing: tuple[str, ...],
    layout: Layout,
    faults: list[Fault],
) -> Iterator[pa.RecordBatch]:
    """Yields the rows of a file; bad lines are added to `faults`."""
    # It is not known yet which columns hold numbers or bags.
    uses = Uses(numbers=frozenset(names), separators=dict.fromkeys(names))
    for segment in (segment for part in reader.plan([source], _PART_BYTES, ()) for segment in part):
        for rows in reader.read(segment, list(names), existing, layout, faults, uses=uses):
            yield rows.batch


def _unwrapped(values: pa.Array) -> pa.Array:
    """Unwraps lists of at most one value each; the reader of JSON lines wraps every value of a possible bag."""
    lengths = pc.fill_null(pc.list_value_length(values), 0)
    if (pc.max(lengths).as_py() or 0) > 1:
        return values
    places = pc.if_else(pc.equal(lengths, 1), pc.subtract(pc.cumulative_sum(lengths), 1), pa.scalar(None, pa.int64()))
    return pc.list_flatten(values).take(places)


def _layout_of(reader: Csv, source: Source) -> tuple[Layout, bool]:
    """Returns the layout of a delimited text, and whether its first line names the columns."""
    layout = Layout()
    fields = reader.first_fields(source, layout)
    for delimiter in _OTHER_DELIMITERS if len(fields) == 1 else ():
        other = reader.first_fields(source, Layout(delimiter=delimiter))
        if len(other) > len(fields):
            layout, fields = Layout(delimiter=delimiter), other
    without = replace(layout, columns=tuple(f"c{place}" for place in range(1, len(fields) + 1)))
    return (layout, True) if _are_names(reader, source, fields, without) else (without, False)


def _are_names(reader: Csv, source: Source, fields: Sequence[str], layout: Layout) -> bool:
    """Returns whether the fields of a first line are column names rather than values."""
    if len(set(fields)) == len(fields) and all(fields) and not any(_is_number(field) for field in fields):
        return True
    names = layout.columns or ()
    batch = next(_batches(reader, source, names, names, layout, []), None)
    if batch is None or batch.num_rows < 2:
        return not any(_is_number(field) for field in fields) and any(fields)
    below = [pc.utf8_trim_whitespace(plain(batch.column(name))).slice(1) for name in names]
    is_text = [not _is_number(field) and field.lower() not in _MISSING for field in fields]
    # A text above a column of numbers is a name, so the whole line holds names.
    if any(text and _are_numbers(values) for text, values in zip(is_text, below, strict=True)):
        return True
    comes_again = (
        field and pc.any(pc.equal(values, field)).as_py() for field, values in zip(fields, below, strict=True)
    )
    return any(fields) and not any(_is_number(field) for field in fields) and not any(comes_again)


def _is_number(text: str) -> bool:
    return re.fullmatch(_NUMBER, text) is not None


def _are_numbers(values: pa.Array) -> bool:
    """Returns whether there are values and all are numbers."""
    given = values.filter(pc.not_equal(values, ""))
    return len(given) > 0 and bool(pc.all(pc.match_substring_regex(given, f"^(?:{_NUMBER})$")).as_py())


def _column(name: str, values: pa.Array, separators: str) -> Column:
    """Describes a column, whose values are parsed like the values of a run.

    Args:
        name: of the column.
        values: one value per row.
        separators: characters that may separate the values of a text.
    """
    if pa.types.is_large_list(values.type):
        return Column(name, "list", int(pc.sum(_is_empty_list(values)).as_py() or 0), _counts(_texts(values.flatten())))
    texts = _texts(values)
    given = texts.filter(pc.and_(pc.is_valid(texts), pc.not_equal(texts, "")))
    num_missing = len(texts) - len(given)
    counts = _counts(given)
    if len(given) and pc.all(pc.match_substring_regex(given, f"^(?:{_NUMBER})$")).as_py():
        numbers = pc.cast(pc.ascii_trim_whitespace(given), pa.float64())
        least, greatest = pc.min_max(numbers).as_py().values()
        is_integer = pc.all(pc.match_substring_regex(given, f"^(?:{_INTEGER})$")).as_py()
        # A floating-point number or a decimal in Parquet or JSON is never an id.
        is_integer = is_integer and not _has_fraction(values.type)
        return Column(name, "integer" if is_integer else "number", num_missing, counts, least, greatest)
    separator = next((each for each in separators if _share_with(given, each) > _BAG_SHARE), None)
    if separator is not None and len(counts) > 2:
        parts = pc.utf8_trim_whitespace(pc.list_flatten(pc.split_pattern(given, separator)))
        return Column(name, "text", num_missing, _counts(parts.filter(pc.not_equal(parts, ""))), separator=separator)
    others = [(text, count) for text, count in counts if not _is_number(text)]
    is_strange = len(others) <= _FEW_OTHERS and 2 * sum(count for _, count in others) < len(given)
    return Column(name, "text", num_missing, counts, strange=others if is_strange else ())


def _is_empty_list(values: pa.Array) -> pa.Array:
    return pc.equal(pc.fill_null(pc.list_value_length(values), 0), 0)


def _texts(values: pa.Array) -> pa.Array:
    return (
        values.cast(pa.large_string())
        if not pa.types.is_nested(values.type)
        else pa.nulls(len(values), pa.large_string())
    )


def _counts(values: pa.Array) -> list[tuple[str, int]]:
    counted = sorted(
        ((entry["values"], entry["counts"]) for entry in pc.value_counts(values).to_pylist()),
        key=lambda entry: (-entry[1], entry[0] or ""),
    )
    return [(value, count) for value, count in counted if value is not None]


def _share_with(values: pa.Array, separator: str) -> float:
    return float(pc.mean(pc.match_substring(values, separator)).as_py() or 0.0) if len(values) else 0.0
