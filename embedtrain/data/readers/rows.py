"""What every format of rows shares: how the rows of text files are laid out, and what reading them yields."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedtrain.data.readers.blocks import Segment, first_line, plan_parts, read_records
from embedtrain.data.readers.quotes import Quoting
from embedtrain.data.sources import CHUNK_BYTES, Source
from embedtrain.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How the rows of a delimited text stand in their lines.

    Attributes:
        columns: names of all columns, in order; None if the first line of each file holds them.
        delimiter: between fields; None for that of the format.
        quote: the character around fields that hold delimiters or line breaks; None for no quotes; "auto" for `"`,
            and for no quotes between tabs.

    Raises:
        UserError: the delimiter or the quote is not one ASCII character, is a line end, or they are the same.
    """

    columns: tuple[str, ...] | None = None
    delimiter: str | None = None
    quote: str | None = "auto"

    def __post_init__(self) -> None:
        for name, value in (("delimiter", self.delimiter), ("quote", None if self.quote == "auto" else self.quote)):
            if value is not None and (len(value) != 1 or not value.isascii() or value in "\r\n"):
                raise UserError(f"{name}: expected one ASCII character that is no line end, got {value!r}")
        if self.delimiter is not None:
            self.quoting(self.delimiter)

    def quoting(self, delimiter: str) -> Quoting | None:
        """Returns the delimiter and the quote of a text; None if nothing is quoted.

        Args:
            delimiter: that of the format; the layout's own takes precedence.

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
    """What columns are used for, as far as a reader needs to know; by default for single ids and texts.

    Attributes:
        numbers: columns of numbers, which may have a fraction. A floating-point number anywhere else is no id, and a
            line of JSON with one is a fault.
        parsed: columns that delimited text is parsed to float64 while it is read, a missing value to null; a block
            with a value that is no number comes as texts all the same.
        counted: columns in which the true and the false of JSON are 1 and 0; elsewhere they are texts.
        separators: of the columns that may hold bags, what parts the values of a text; None if a text is one value. A
            line of JSON with a list anywhere else is a fault.
    """

    numbers: frozenset[str] = frozenset()
    parsed: frozenset[str] = frozenset()
    separators: Mapping[str, str | None] = field(default_factory=dict)
    counted: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Fault:
    """A line that cannot be used.

    Attributes:
        segment: where it lies.
        line: its number in the segment, from 0; in Parquet that of the row.
        reason: what is wrong with it.
    """

    segment: Segment
    line: int
    reason: str


@dataclass(frozen=True)
class Rows:
    """Some rows of a segment, in order.

    Attributes:
        batch: the columns that were asked for, by their names. Columns of text formats are large_string, and empty if
            a value is missing; else columns have the types of the file, and null if a value is missing.
        first: number of the line, from 0 in the segment, that the block of the rows begins with.
        find_lines: returns [num_rows] int64, on which line from `first` on each row begins; None if row `i` is on
            line `first + i`.
    """

    batch: pa.RecordBatch
    first: int
    find_lines: Callable[[], NDArray[np.int64]] | None = None

    @property
    def lines(self) -> NDArray[np.int64]:
        """[num_rows] int64; the line of each row, from 0 in the segment."""
        if self.find_lines is None:
            return np.arange(self.first, self.first + self.batch.num_rows)
        return self.first + self.find_lines()


def refuse_repeats(names: Sequence[str], source: Source) -> None:
    """Refuses a file that names a column more than once.

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
    """Returns the type of a column as `plain` returns it."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind) or pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.large_list(plain_type(kind.value_type))
    return kind


@dataclass(frozen=True)
class Parsed:
    """What became of a block of text.

    Attributes:
        batch: the rows that could be parsed.
        num_lines: lines of the block, blank ones included.
        wrong: what is wrong with each line that could not be parsed, by its number from 0 in the block.
        find_lines: as in `Rows`.
    """

    batch: pa.RecordBatch
    num_lines: int
    wrong: dict[int, str] = field(default_factory=dict)
    find_lines: Callable[[], NDArray[np.int64]] | None = None


class Format(ABC):
    """A format of files that hold rows.

    Attributes:
        suffixes: endings that `auto` recognises.
        other_suffixes: further endings that are read if the user names the format.
        has_names: whether columns have names.
        has_header: whether the first line names the columns if the layout gives no names.
        delimiter: between the fields of a delimited text, unless the layout gives another.
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
            names: the columns that are going to be read; a format without names of its own takes them.
            layout: how the lines of text are laid out.

        Raises:
            UserError: the file cannot be read, does not say, or names a column more than once.
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
            columns: of the file, as `columns` returned them.
            layout: how the lines of text are laid out.
            faults: takes the lines that cannot be parsed.
            chunk_bytes: about how much is held at a time.
            uses: what the columns are used for.

        Raises:
            UserError: the file cannot be read as what it should be; the message names file and line.
        """

    @abstractmethod
    def place(self, fault: Fault) -> str:
        """Names the file and the line of a fault, counted from 1 as an editor does; in Parquet the row, from 0."""

    @abstractmethod
    def copy_head(self, source: Source, path: str, layout: Layout, max_bytes: int) -> int:
        """Copies about the first `max_bytes` of a file to a local path, unpacked; returns how many are copied."""


class TextFormat(Format):
    """A format whose records are lines; a subclass says what a line means."""

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
        """Returns which characters quote line breaks; None if none do."""
        return None

    def skip_header(self, block: bytes, layout: Layout) -> tuple[bytes, int]:
        """Returns a file's first block without what only names the columns, and how many lines that is."""
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
        copied = 0
        with open(path, "wb") as file:
            blocks = read_records(Segment(source), self.quoting(layout), chunk_bytes=min(CHUNK_BYTES, max_bytes))
            for block in blocks:
                file.write(block)
                copied += len(block)
                if copied >= max_bytes:
                    break
        return copied
