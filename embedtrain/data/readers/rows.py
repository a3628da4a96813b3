"""Shared parts of all formats: layouts, uses of columns, faults, rows and the `Format` protocol."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedtrain.data.readers.blocks import Segment, first_line, plan_parts, read_records, write_first
from embedtrain.data.readers.quotes import Quoting
from embedtrain.data.sources import CHUNK_BYTES, Source
from embedtrain.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Describes the lines of a delimited text.

    Attributes:
        columns: names of all columns, in order; None if the first line of each file names them.
        delimiter: separates fields; None for the format's default.
        quote: quotes fields that contain delimiters or line breaks; None for no quotes; "auto" for `"`, or for no
            quotes if the delimiter is a tab.

    Raises:
        UserError: the delimiter or the quote is not one ASCII character, is a line end, or both are the same.
    """

    columns: tuple[str, ...] | None = None
    delimiter: str | None = None
    quote: str | None = "auto"

    def __post_init__(self) -> None:
        for name, value in (("delimiter", self.delimiter), ("quote", None if self.quote == "auto" else self.quote)):
            if value is not None and (len(value) != 1 or not value.isascii() or value in "\r\n"):
                raise UserError(f"{name}: expected one ASCII character other than a line end, got {value!r}")
        if self.delimiter is not None:
            self.quoting(self.delimiter)

    def quoting(self, delimiter: str) -> Quoting | None:
        """Returns the delimiter and the quote of a text; None without quotes.

        Args:
            delimiter: the format's delimiter; the layout's own takes precedence.

        Raises:
            UserError: delimiter and quote are the same character.
        """
        delimiter = self.delimiter or delimiter
        quote = (None if delimiter == "\t" else '"') if self.quote == "auto" else self.quote
        if quote == delimiter:
            raise UserError(f"quote: expected another character than the delimiter, got {quote!r} for both")
        return None if quote is None else Quoting(delimiter, quote)


@dataclass(frozen=True)
class Uses:
    """Says how columns are used, as far as readers need to know; by default as single ids and texts.

    Attributes:
        numbers: columns of floating-point numbers. In other columns a floating-point number in a JSON line is a fault.
        parsed: columns that readers of delimited text parse to float64, with null for missing values; a block with a
            value that is not a number stays text.
        counted: columns in which true and false of JSON become 1 and 0; in other columns they are texts.
        separators: per column that may hold bags, the separator of values in a text, or None. In other columns a list
            in a JSON line is a fault.
    """

    numbers: frozenset[str] = frozenset()
    parsed: frozenset[str] = frozenset()
    separators: Mapping[str, str | None] = field(default_factory=dict)
    counted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fault:
    """Describes a bad line.

    Attributes:
        segment: segment of the line.
        line: its number in the segment, from 0; in Parquet the row number.
        reason: why it is bad.
    """

    segment: Segment
    line: int
    reason: str


@dataclass(frozen=True)
class Rows:
    """Holds consecutive rows of a segment.

    Attributes:
        batch: the requested columns, by name. Columns of text formats are large_string with empty texts for missing
            values; other columns have the types of the file with nulls for missing values.
        first: number of the first line of the rows' block, from 0 in the segment.
        find_lines: returns [num_rows] int64: the line, relative to `first`, on which each row begins; None if row `i`
            is on line `first + i`.
    """

    batch: pa.RecordBatch
    first: int
    find_lines: Callable[[], NDArray[np.int64]] | None = None

    @property
    def lines(self) -> NDArray[np.int64]:
        """[num_rows] int64: the line of each row, from 0 in the segment."""
        if self.find_lines is None:
            return np.arange(self.first, self.first + self.batch.num_rows)
        return self.first + self.find_lines()


def refuse_repeats(names: Sequence[str], source: Source) -> None:
    """Checks that a file does not name a column more than once.

    Raises:
        UserError: it does.
    """
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise UserError(f"{source.url}: the file names {', '.join(map(repr, repeated))} more than once")


def plain(column: pa.Array) -> pa.Array:
    """Decodes dictionaries, string views and fixed-size lists to plain arrays."""
    kind = plain_type(column.type)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if kind == column.type else column.cast(kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Returns the type that `plain` gives a column."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    return kind


@dataclass(frozen=True)
class Parsed:
    """Holds the result of parsing a block of text.

    Attributes:
        batch: the parsed rows.
        num_lines: number of lines of the block, including blank lines.
        wrong: the reason per bad line, by its number from 0 in the block.
        find_lines: see `Rows`.
    """

    batch: pa.RecordBatch
    num_lines: int
    wrong: dict[int, str] = field(default_factory=dict)
    find_lines: Callable[[], NDArray[np.int64]] | None = None


class Format(ABC):
    """A file format of rows.

    Attributes:
        suffixes: endings that `auto` recognises.
        other_suffixes: further suffixes that are read if the user names the format.
        has_names: whether columns have names.
        has_header: whether the first line names the columns if the layout gives no names.
        delimiter: default delimiter of a delimited text.
    """

    suffixes: tuple[str, ...] = ()
    other_suffixes: tuple[str, ...] = ()
    has_names: bool = True
    has_header: bool = False
    delimiter: str = ","

    @abstractmethod
    def columns(self, source: Source, names: Sequence[str], layout: Layout) -> tuple[str, ...]:
        """Returns the names of a file's columns.

        Args:
            source: the file.
            names: the columns to read; a format without column names uses these names.
            layout: layout of text lines.

        Raises:
            UserError: the file cannot be read, does not name its columns, or names a column more than once.
        """

    @abstractmethod
    def plan(self, sources: Sequence[Source], part_bytes: int, undivided: Collection[str]) -> list[list[Segment]]:
        """Divides files into at most 256 parts, in their order; see `plan_parts`."""

    @abstractmethod
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
        """Reads columns of a segment, a few MiB at a time.

        Args:
            segment: the part of a file.
            names: the columns to read.
            columns: columns of the file, as returned by `columns`.
            layout: how the lines of text are laid out.
            faults: bad lines are added to this list.
            chunk_bytes: approximate size of a block in memory.
            uses: uses of the columns.

        Raises:
            UserError: the file cannot be parsed; the message names file and line.
        """

    @abstractmethod
    def place(self, fault: Fault) -> str:
        """Returns the file and the line (from 1; in Parquet the row, from 0) of a fault, for messages."""

    @abstractmethod
    def copy_head(self, source: Source, path: str, layout: Layout, max_bytes: int) -> int:
        """Copies about the first `max_bytes` of a file, decompressed, to a local path; returns the number copied."""


class TextFormat(Format):
    """A format of text records; subclasses parse the records."""

    @abstractmethod
    def parse(
        self,
        block: bytes,
        names: Sequence[str],
        columns: tuple[str, ...],
        layout: Layout,
        uses: Uses,
    ) -> Parsed:
        """Parses whole records of checked UTF-8 text; the arguments are those of `Format.read`."""

    def quoting(self, layout: Layout) -> Quoting | None:
        """Returns the characters that quote line breaks; None if there are none."""
        return None

    def skip_header(self, block: bytes, layout: Layout) -> tuple[bytes, int]:
        """Returns a file's first block without the header, and the number of lines of the header."""
        return block, 0

    def plan(self, sources: Sequence[Source], part_bytes: int, undivided: Collection[str]) -> list[list[Segment]]:
        """See `Format.plan`."""
        return plan_parts(sources, part_bytes, undivided)

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
        at, is_first = 0, segment.start == 0
        for block in read_records(segment, self.quoting(layout), chunk_bytes=chunk_bytes):
            if is_first:
                is_first = not block.strip()
                block, num_skipped = self.skip_header(block, layout)
                at += num_skipped
            if not block:
                continue
            try:
                parsed = self.parse(block, names, columns, layout, uses)
            except pa.ArrowException as error:
                place = self.place(Fault(segment, at, ""))
                raise UserError(f"{place} and the lines after it: {' '.join(str(error).split())}") from error
            faults += [Fault(segment, at + line, reason) for line, reason in parsed.wrong.items()]
            if parsed.batch.num_rows:
                yield Rows(parsed.batch, at, parsed.find_lines)
            at += parsed.num_lines

    def place(self, fault: Fault) -> str:
        """See `Format.place`."""
        return f"{fault.segment.source.url}:{first_line(fault.segment) + fault.line}"

    def copy_head(self, source: Source, path: str, layout: Layout, max_bytes: int) -> int:
        """See `Format.copy_head`."""
        blocks = read_records(Segment(source), self.quoting(layout), chunk_bytes=min(CHUNK_BYTES, max_bytes))
        return write_first(blocks, path, max_bytes)
