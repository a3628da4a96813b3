"""Reads rows to score, in blocks, from files of any format or from lines of standard input."""

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
"""Number of rows that one rank scores at once. It is fixed, so that scores do not depend on the number of ranks."""

_NAME_OF_INPUT = "standard input"
_FAULTS_SHOWN = 3
_PAUSE_SECONDS = 0.005
"""Poll timeout of standard input, in seconds: after a pause of this length the rows read so far are scored."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unit:
    """Consecutive rows of a file that one rank scores.

    Attributes:
        batch: the columns.
        lines: [n] int64; line number of each row in the file, from 0.
        where: URL of the file.
        file: index of the file.
    """

    batch: pa.RecordBatch
    lines: NDArray[np.int64]
    where: str
    file: int

    @property
    def rows(self) -> Rows:
        """The rows in the form that readers return."""
        return Rows(self.batch, 0, lambda: self.lines)

    def __reduce__(self) -> tuple[Callable[..., Unit], tuple[Any, ...]]:
        # By default, pickle would send the whole block of which the batch is a slice.
        sent = self.batch.serialize().to_pybytes(), self.batch.schema
        return _received, (*sent, self.lines.copy(), self.where, self.file)


def _received(batch: bytes, schema: pa.Schema, *others: Any) -> Unit:
    return Unit(pa.ipc.read_record_batch(batch, schema), *others)


@dataclass(frozen=True)
class Round:
    """Holds the units that the ranks score in parallel.

    Attributes:
        units: at most one unit per rank.
        num_bad: number of lines since the previous round that could not be parsed.
        shown: descriptions of a few of these lines.
    """

    units: list[Unit]
    num_bad: int = 0
    shown: list[str] = field(default_factory=list)


class RowFiles:
    """Reads the rows of files or of standard input, once and in order.

    Args:
        path: path of the files, as in `expand_sources`; or "-" for standard input.
        schema: meaning of the columns.
        keep: further columns to read unchanged.
        standard_input: file descriptor of standard input.

    Raises:
        UserError: the file does not exist.
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
        # Kept columns are copied as they are spelled: a number in them may be out of range.
        uses = schema.uses
        looked_up = {column.name for column in schema.categorical}
        self._uses = replace(uses, numbers=uses.numbers | set(keep) - looked_up, parsed=uses.parsed - set(keep))
        if path == STANDARD_INPUT:
            if not isinstance(self._format, TextFormat):
                raise UserError(f"data.format={schema.file_format} cannot be read from standard input: give a file")
            self._sources = [_source_of(standard_input)]
        else:
            self._sources = take_sources(path, suffixes_of(schema.reader))

    @property
    def urls(self) -> list[str]:
        """URLs of the files; empty for standard input."""
        return [source.url for source in self._sources if not isinstance(source, OpenSource)]

    def rounds(self, num_ranks: int) -> Iterator[Round]:
        """Yields the rows in order, with one unit per rank while there are enough rows.

        Raises:
            UserError: a file lacks a column or cannot be parsed.
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
        """Returns the file and the line number of a row, for messages."""
        return self._format.place(Fault(Segment(self._sources[unit.file]), line, ""))

    def _describe(self, faults: Sequence[Fault]) -> list[str]:
        return [f"{self._format.place(fault)}: {fault.reason}" for fault in faults[:_FAULTS_SHOWN]]

    def _columns(self, source: Source) -> tuple[str, ...]:
        """Returns the names of a file's columns after checking that no required column is missing."""
        if isinstance(source, OpenSource) and isinstance(self._format, JsonLines):
            return self._names  # A key absent from a line is a missing value; later lines may have other keys.
        columns = self._format.columns(source, self._names, self.schema.layout)
        if isinstance(source, OpenSource):
            assert isinstance(source.file, StandardInput)
            source.file.begin_again()
        keys = {**dict.fromkeys(self._keep, "--keep or --by"), **self.schema.keys}
        require_columns(source, self._names, columns, self.schema.reader, keys)
        return columns


class StandardInput(io.RawIOBase):
    """Standard input that returns partial reads, and whose beginning can be read twice.

    Args:
        descriptor: file descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held: bytes | None = b""
        self._again = b""

    def readable(self) -> bool:
        """Returns True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Returns the available bytes, at most `size`; empty at the end of input."""
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
        """Rewinds to the beginning; can be called once."""
        assert self._held is not None
        self._again, self._held = self._held, None


def _source_of(descriptor: int) -> Source:
    return OpenSource(_NAME_OF_INPUT, 0, "", file=StandardInput(descriptor))  # type: ignore[arg-type]


def schema_of_file(schema: ClickSchema, *, path: str | Sequence[str], is_given: bool) -> ClickSchema:
    """Returns the schema with the file format that the suffix of `path` names.

    Args:
        schema: the run's schema.
        path: path of the files; a list, a folder or a glob keeps the run's format.
        is_given: whether the user set a format, which is then kept.
    """
    if is_given or not isinstance(path, str) or path == STANDARD_INPUT:
        return schema
    name = next((name for name, format in FORMATS.items() if suffix_of(path) in format.suffixes), None)
    if name in (None, schema.reader) or name == "lines" or suffix_of(path) in FORMATS[schema.reader].other_suffixes:
        return schema
    assert name is not None
    _logger.info(
        f"{path} is read as {name} by its suffix; set data.format={schema.file_format} to read it as in training"
    )
    is_delimited = FORMATS[name].has_header and FORMATS[schema.reader].has_header
    columns = schema.columns if is_delimited else None
    return replace(schema, file_format=name, columns=columns, delimiter=FORMATS[name].delimiter, quote="auto")
