"""Reads rows that are to be scored, some at a time: files of any format, or the lines of standard input."""

from __future__ import annotations

import io
import logging
import os
import select
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from embedtrain.data.click_schema import ClickSchema
from embedtrain.data.readers import FORMATS, Fault, Rows, TextFormat, require_columns, suffixes_of
from embedtrain.data.readers.blocks import OpenSource, Segment
from embedtrain.data.readers.jsonl import JsonLines
from embedtrain.data.sources import Source, suffix_of, take_sources
from embedtrain.data.stream import STANDARD_INPUT
from embedtrain.errors import UserError

UNIT_ROWS = 8192
"""Rows that one rank scores at once. Files are cut alike whatever the number of ranks, and so are scores."""

_NAME_OF_INPUT = "standard input"
_FAULTS_SHOWN = 3
_PAUSE_SECONDS = 0.005
"""If no more of standard input comes for so long, what has come is scored."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """Consecutive rows of a file, which one rank scores.

    Attributes:
        batch: the columns.
        lines: [n] int64; the line of each row, from 0 in the file.
        where: the file.
        file: its number.
    """

    batch: pa.RecordBatch
    lines: NDArray[np.int64]
    where: str
    file: int

    @property
    def rows(self) -> Rows:
        """The rows as a reader gives them."""
        return Rows(self.batch, 0, lambda: self.lines)

    def __reduce__(self) -> tuple[Callable[..., Unit], tuple[Any, ...]]:
        # pickle would send all of the block that the batch is a slice of.
        sent = self.batch.serialize().to_pybytes(), self.batch.schema
        return _received, (*sent, self.lines.copy(), self.where, self.file)


def _received(batch: bytes, schema: pa.Schema, *others: Any) -> Unit:
    return Unit(pa.ipc.read_record_batch(batch, schema), *others)


@dataclass(frozen=True)
class Round:
    """What the ranks score together.

    Attributes:
        units: at most one per rank.
        num_bad: lines before the end of these units, and after the round before, that could not be parsed.
        shown: what is wrong with a few of them.
    """

    units: list[Unit]
    num_bad: int = 0
    shown: list[str] = field(default_factory=list)


class RowFiles:
    """The rows of files, or of standard input, read once and in order.

    Args:
        path: as `expand_sources` takes it; or "-" for standard input.
        schema: what the columns mean.
        keep: further columns that are read, as they stand in the file.
        standard_input: the file descriptor that "-" stands for.

    Raises:
        UserError: there is no such file.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        schema: ClickSchema,
        keep: Sequence[str] = (),
        *,
        standard_input: int = 0,
    ) -> None:
        self.schema = schema
        self._format = FORMATS[schema.reader]
        self._keep = keep
        self._names = tuple(dict.fromkeys((*schema.used_columns, *keep)))
        # What is kept is kept as it is spelled, and may be any number.
        uses = schema.uses
        looked_up = {column.name for column in schema.categorical}
        self._uses = replace(uses, numbers=uses.numbers | set(keep) - looked_up, parsed=uses.parsed - set(keep))
        if path == STANDARD_INPUT:
            if not isinstance(self._format, TextFormat):
                raise UserError(f"standard input is of lines: data.format={schema.file_format} cannot come by it")
            self._sources = [_source_of(standard_input)]
        else:
            self._sources = take_sources(path, suffixes_of(schema.reader))

    @property
    def urls(self) -> list[str]:
        """Where the files lie; empty for standard input."""
        return [source.url for source in self._sources if not isinstance(source, OpenSource)]

    def rounds(self, num_ranks: int) -> Iterator[Round]:
        """Yields the rows in order, for each rank a unit as long as there are enough.

        Raises:
            UserError: a file lacks a column, or cannot be read as what it should be.
        """
        format, schema = self._format, self.schema
        for number, source in enumerate(self._sources):
            segment, faults = Segment(source), list[Fault]()
            columns = self._columns(source)
            for rows in format.read(segment, self._names, columns, schema.layout, faults, uses=self._uses):
                lines = rows.lines
                for start in range(0, rows.batch.num_rows, UNIT_ROWS * num_ranks):
                    stop = min(start + UNIT_ROWS * num_ranks, rows.batch.num_rows)
                    units = [
                        Unit(rows.batch.slice(at, UNIT_ROWS), lines[at : at + UNIT_ROWS], source.url, number)
                        for at in range(start, stop, UNIT_ROWS)
                    ]
                    yield Round(units, len(faults), self._describe(faults))
                    faults.clear()
            if faults:
                yield Round([], len(faults), self._describe(faults))

    def place(self, unit: Unit, line: int) -> str:
        """Names the file and the line of a row."""
        return self._format.place(Fault(Segment(self._sources[unit.file]), line, ""))

    def _describe(self, faults: Sequence[Fault]) -> list[str]:
        return [f"{self._format.place(fault)}: {fault.reason}" for fault in faults[:_FAULTS_SHOWN]]

    def _columns(self, source: Source) -> tuple[str, ...]:
        """Returns the names of a file's columns, after making sure that all that are read are there."""
        if isinstance(source, OpenSource) and isinstance(self._format, JsonLines):
            return self._names  # What a line lacks is missing; the lines to come are not known.
        columns = self._format.columns(source, self._names, self.schema.layout)
        if isinstance(source, OpenSource):
            assert isinstance(source.file, StandardInput)
            source.file.begin_again()
        keys = {**dict.fromkeys(self._keep, "--keep or --by"), **self.schema.keys}
        require_columns(source, self._names, columns, self.schema.reader, keys)
        return columns


class StandardInput(io.RawIOBase):
    """Standard input, whose beginning can be read twice: `read` returns what has come and waits for no more.

    Args:
        descriptor: of the file.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held: bytes | None = b""
        self._again = b""

    def readable(self) -> bool:
        """Returns True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Returns at most `size` bytes; none at the end."""
        if self._again:
            block, self._again = self._again[:size], self._again[size:]
            return block
        block = os.read(self._descriptor, size)
        while block and len(block) < size and select.select([self._descriptor], [], [], _PAUSE_SECONDS)[0]:
            more = os.read(self._descriptor, size - len(block))
            if not more:
                break
            block += more
        if self._held is not None:
            self._held += block
        return block

    def begin_again(self) -> None:
        """Returns to the beginning, once."""
        assert self._held is not None
        self._again, self._held = self._held, None


def _source_of(descriptor: int) -> Source:
    return OpenSource(_NAME_OF_INPUT, 0, "", file=StandardInput(descriptor))  # type: ignore[arg-type]


def schema_of_file(schema: ClickSchema, *, path: str | Sequence[str], is_given: bool) -> ClickSchema:
    """Returns the schema for files of another format than that of the training, as their names tell it.

    Args:
        schema: of the run.
        path: of the files; a list, a folder or a glob is of the run's format.
        is_given: whether the user named a format.
    """
    if is_given or not isinstance(path, str) or path == STANDARD_INPUT:
        return schema
    name = next((name for name, format in FORMATS.items() if suffix_of(path) in format.suffixes), None)
    if name in (None, schema.reader) or name == "lines" or suffix_of(path) in FORMATS[schema.reader].other_suffixes:
        return schema
    assert name is not None
    _logger.info(f"{path}: read as {name}, by its name; data.format={schema.file_format} reads it as the training did")
    is_delimited = FORMATS[name].has_header and FORMATS[schema.reader].has_header
    columns = schema.columns if is_delimited else None
    return replace(schema, file_format=name, columns=columns, delimiter=FORMATS[name].delimiter, quote="auto")
