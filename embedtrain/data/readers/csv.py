"""CSV: delimited fields, quoted if they contain delimiters or line breaks, as in pandas and Arrow."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from embedtrain.data.readers.blocks import Segment, read_records
from embedtrain.data.readers.quotes import Quoting, find_line_ends, find_spans
from embedtrain.data.readers.rows import Layout, Parsed, TextFormat, Uses, refuse_repeats
from embedtrain.data.sources import Source
from embedtrain.errors import UserError

_HEADER_BYTES = 1 << 16
_LINE_ENDS = (10, 13)
_BARE_RETURN = re.compile(rb"\r(?!\n)")


class Csv(TextFormat):
    """Reads lines of delimited fields; the first line names the columns unless the layout does."""

    suffixes: tuple[str, ...] = (".csv",)
    other_suffixes: tuple[str, ...] = (".tsv", ".txt", "")
    has_header = True

    def quoting(self, layout: Layout) -> Quoting | None:
        """See `TextFormat.quoting`."""
        return layout.quoting(self.delimiter)

    def columns(self, source: Source, names: Sequence[str], layout: Layout) -> tuple[str, ...]:
        """See `Format.columns`; spaces around a name are dropped."""
        if layout.columns is not None:
            return layout.columns
        found = tuple(self.first_fields(source, layout))
        refuse_repeats(found, source)
        return found

    def first_fields(self, source: Source, layout: Layout) -> list[str]:
        """Returns the fields of a file's first line, without surrounding spaces.

        Raises:
            UserError: the file cannot be read, or is empty.
        """
        blocks = read_records(Segment(source), self.quoting(layout), chunk_bytes=_HEADER_BYTES)
        block = next((block for block in blocks if block.strip()), b"")
        if not block:
            raise UserError(f"{source.url} is empty, but its first line must name the columns")
        header = block[: len(block) - len(self.skip_header(block, layout)[0])]
        return [name.strip() for name in self._fields(header, layout)]

    def _fields(self, record: bytes, layout: Layout) -> list[str]:
        """Returns the fields of one record, split like the fields of rows."""
        if not record.endswith((b"\n", b"\r")):
            record += b"\n"  # Without a line end, Arrow may not find the record.
        reading = pa_csv.ReadOptions(use_threads=False, autogenerate_column_names=True, block_size=len(record) + 1)
        parsing = self._parse_options(layout)
        names = pa_csv.read_csv(pa.BufferReader(record), reading, parsing).column_names
        as_text = pa_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        table = pa_csv.read_csv(pa.BufferReader(record), reading, parsing, as_text)
        return [str(column[0]) for column in table.columns]

    def _parse_options(self, layout: Layout, **options: Any) -> pa_csv.ParseOptions:
        quoting = self.quoting(layout)
        return pa_csv.ParseOptions(
            delimiter=layout.delimiter or self.delimiter,
            quote_char=False if quoting is None else quoting.quote,
            newlines_in_values=quoting is not None,
            **options,
        )

    def skip_header(self, block: bytes, layout: Layout) -> tuple[bytes, int]:
        """See `TextFormat.skip_header`; blank lines before the names are skipped too."""
        if layout.columns is not None:
            return block, 0
        ends, _ = _records(block, self.quoting(layout))
        if len(ends) == 0:
            return b"", len(find_line_ends(block))
        return block[int(ends[0]) :], len(find_line_ends(block[: int(ends[0])]))

    def parse(
        self,
        block: bytes,
        names: Sequence[str],
        columns: tuple[str, ...],
        layout: Layout,
        uses: Uses,
    ) -> Parsed:
        """See `TextFormat.parse`; blank lines are no rows."""
        if not block.lstrip(b"\r\n"):
            return Parsed(_empty(names), len(find_line_ends(block)))
        table, wrong = self._read(block, names, columns, layout, dict.fromkeys(uses.parsed, pa.float64()))
        num_records, num_lines = table.num_rows + len(wrong), _count_lines(block)
        if num_records == num_lines and not _has_bare_returns(block):
            # The common case: no line is blank, and no quoted field contains a line end.
            line_of = np.arange(num_lines)
        else:
            line_of = _records(block, self.quoting(layout))[1]
            num_lines = _count_lines(_BARE_RETURN.sub(b"\n", block))
            if len(line_of) != num_records:
                raise pa.ArrowInvalid(f"the text has {len(line_of)} records, of which {num_records} could be parsed")
        is_row = np.ones(num_records, np.bool_)
        is_row[list(wrong)] = False
        return Parsed(
            _as_batch(table, names),
            num_lines,
            {int(line_of[record]): reason for record, reason in wrong.items()},
            None if num_records == num_lines and not wrong else lambda: line_of[is_row],
        )

    def _read(
        self,
        block: bytes,
        names: Sequence[str],
        columns: tuple[str, ...],
        layout: Layout,
        types: dict[str, pa.DataType],
    ) -> tuple[pa.Table, dict[int, str]]:
        """Returns the columns, and the reasons of bad records by their number from 0."""
        wrong: dict[int, str] = {}

        def leave_out(row: pa_csv.InvalidRow) -> str:
            wrong[row.number - 1] = f"expected {row.expected_columns} fields, got {row.actual_columns}"
            return "skip"

        # Columns are addressed by index, because unused names need not be unique.
        places = {name: str(columns.index(name)) for name in names}
        try:
            table = pa_csv.read_csv(
                pa.BufferReader(block),
                read_options=pa_csv.ReadOptions(
                    use_threads=False,
                    column_names=[str(place) for place in range(len(columns))],
                    block_size=len(block) + 1,
                ),
                parse_options=self._parse_options(layout, invalid_row_handler=leave_out),
                convert_options=pa_csv.ConvertOptions(
                    include_columns=list(places.values()),
                    column_types={place: types.get(name, pa.large_string()) for name, place in places.items()},
                    null_values=[""],
                    check_utf8=False,
                ),
            )
        except pa.ArrowInvalid:
            if not types:
                raise
            return self._read(block, names, columns, layout, {})
        return table, wrong


def _records(block: bytes, quoting: Quoting | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the end of each record and the line, from 0, on which it begins; blank lines are not records.

    The block consists of whole records, so its end is the end of a record even without a line end.
    """
    ends = find_line_ends(block)
    if len(ends) == 0 or ends[-1] < len(block):
        ends = np.append(ends, len(block))
    record_ends = ends
    if quoting is not None and quoting.quote.encode() in block:
        is_record_end = ~find_spans(block, quoting).are_inside(ends - 1)
        is_record_end[-1] = True
        record_ends = ends[is_record_end]
    starts = np.concatenate([[0], record_ends[:-1]])
    is_blank = np.isin(np.frombuffer(block, np.uint8)[starts], _LINE_ENDS)
    return record_ends[~is_blank], np.searchsorted(ends, starts[~is_blank], side="right")


def _count_lines(block: bytes) -> int:
    return block.count(b"\n") + (not block.endswith(b"\n"))


def _has_bare_returns(block: bytes) -> bool:
    return b"\r" in block and block.count(b"\r") != block.count(b"\r\n")


def _as_batch(table: pa.Table, names: Sequence[str]) -> pa.RecordBatch:
    batches = table.combine_chunks().to_batches()
    return pa.RecordBatch.from_arrays(batches[0].columns, names=list(names)) if batches else _empty(names)


def _empty(names: Sequence[str]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], pa.large_string()) for _ in names], names=list(names))
