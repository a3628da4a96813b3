"""Columns of texts and ids from files of rows in any format, on any fsspec URL."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from embedtrain.data.readers import AUTO, Fault, Format, Layout, Rows, format_of, require_columns
from embedtrain.data.readers.blocks import Segment
from embedtrain.data.readers.rows import Uses
from embedtrain.data.sources import Source
from embedtrain.errors import UserError


@dataclass(frozen=True)
class TextRows:
    """Some rows of a file.

    Attributes:
        columns: one array per name that was asked for: large_string, or large_list of large_string; a column of numbers
            or times as the file has it. All of one length.
        place: names the file and the line of a row.
    """

    columns: list[pa.Array]
    place: Callable[[int], str]


def read_columns(
    sources: Sequence[Source],
    names: Sequence[str],
    format: str = AUTO,
    layout: Layout | None = None,
    separators: Mapping[str, str | None] | None = None,
    keys: Mapping[str, str] | None = None,
    numbers: Collection[str] = (),
) -> Iterator[TextRows]:
    """Reads columns of files, some rows at a time.

    Every id and category is read as text, so that none is rounded or overflows, whatever its size: the digits of
    an integer, a string as it stands.

    Args:
        sources: the files.
        names: of the columns; in "lines" the first names the users and the second the items.
        format: a name in `FORMATS`, or "auto" to go by each file's suffix.
        layout: how the lines of text are laid out.
        separators: as in `Uses`; None if no column may hold bags.
        keys: the settings that name the columns, for messages.
        numbers: the columns that hold numbers or times, not ids.

    Yields:
        Rows; a column holds lists only if it does in the file.

    Raises:
        UserError: a file cannot be read as its format says, lacks a column, or a column holds no ids: the message
            names the file, and what was there instead.
    """
    layout = layout or Layout()
    uses = Uses(numbers=frozenset(numbers), separators=separators or {})
    for source in sources:
        reader, segment = format_of(source, format), Segment(source)
        existing = reader.columns(source, names, layout)
        require_columns(source, names, existing, format, keys or {})
        faults: list[Fault] = []
        for rows in reader.read(segment, list(dict.fromkeys(names)), existing, layout, faults, uses=uses):
            _refuse_faults(faults, reader)
            columns = [
                rows.batch.column(name) if name in numbers else _as_text(source, name, rows.batch.column(name))
                for name in names
            ]
            yield TextRows(columns, _places(rows, segment, reader))
        _refuse_faults(faults, reader)


def _places(rows: Rows, segment: Segment, reader: Format) -> Callable[[int], str]:
    return lambda row: reader.place(Fault(segment, int(rows.lines[row]), ""))


def _refuse_faults(faults: Sequence[Fault], reader: Format) -> None:
    if faults:
        raise UserError(f"{reader.place(faults[0])}: {faults[0].reason}")


def _as_text(source: Source, name: str, column: pa.Array) -> pa.Array:
    if pa.types.is_large_list(column.type):
        return column.cast(pa.large_list(_text_type(source, name, column.type.value_type)))
    return column.cast(_text_type(source, name, column.type))


def _text_type(source: Source, name: str, found: pa.DataType) -> pa.DataType:
    if not any(is_kind(found) for is_kind in (pa.types.is_integer, pa.types.is_large_string, pa.types.is_boolean)):
        raise UserError(
            f"{source.url}: column {name!r} holds {found}: expected integers or strings"
            + (", since a floating-point number cannot hold every 64-bit id" if pa.types.is_floating(found) else "")
        )
    return pa.large_string()
