"""Reads the files of a click log: which parts they divide into, and the rows of a part with their line numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from embedtrain.data.click_schema import ClickSchema
from embedtrain.data.readers import FORMATS, Fault, Rows, require_columns
from embedtrain.data.readers.blocks import Segment, has_quoted_line_break
from embedtrain.data.readers.rows import TextFormat
from embedtrain.data.sources import CHUNK_BYTES, Source
from embedtrain.distributed.ranks import Ranks


@dataclass(frozen=True)
class ClickFiles:
    """The parts of a click log, which do not depend on the number of ranks.

    Attributes:
        parts: in order; each is a list of segments: bytes of a text file, row groups of a Parquet file.
        columns: the names of each source's columns, by URL.
    """

    parts: list[list[Segment]]
    columns: dict[str, tuple[str, ...]]


def plan_files(sources: Sequence[Source], schema: ClickSchema, part_bytes: int, ranks: Ranks) -> ClickFiles:
    """Divides files into parts and makes sure that each holds the schema's columns.

    A text file is divided at its line ends, but not if a quoted field holds a line end. To find this out, the ranks
    read every divided file of a layout with quotes once more, whether it has quotes or not.

    Collective: every rank.

    Raises:
        UserError: a file lacks a column, or is not of the schema's format.
    """
    format, names = FORMATS[schema.reader], schema.used_columns

    def plan(undivided: Sequence[str] = ()) -> ClickFiles:
        columns = {source.url: format.columns(source, names, schema.layout) for source in sources}
        for source in sources:
            require_columns(source, names, columns[source.url], schema.reader, schema.keys)
        return ClickFiles(format.plan(sources, part_bytes, undivided), columns)

    files = ranks.run_on_first(plan)
    if not isinstance(format, TextFormat) or format.quoting(schema.layout) is None:
        return files
    mine = files.parts[ranks.rank :: ranks.size]
    found = ranks.run_on_each(lambda: _with_quoted_line_breaks(mine, format, schema))
    undivided = sorted({url for urls in ranks.all_gather(found) for url in urls})
    return ranks.run_on_first(lambda: plan(undivided)) if undivided else files


def read_rows(
    segment: Segment,
    schema: ClickSchema,
    columns: tuple[str, ...],
    faults: list[Fault],
    chunk_bytes: int = CHUNK_BYTES,
) -> Iterator[Rows]:
    """Reads a segment, a few MiB at a time; lines that do not have the right number of fields go to `faults`.

    Raises:
        UserError: the file cannot be read as what it should be.
    """
    format = FORMATS[schema.reader]
    return format.read(
        segment, schema.used_columns, columns, schema.layout, faults, chunk_bytes=chunk_bytes, uses=schema.uses
    )


def describe_fault(fault: Fault, schema: ClickSchema) -> str:
    """Names the file and the line, counted from 1, as an editor does; for Parquet the row, counted from 0."""
    return f"{FORMATS[schema.reader].place(fault)}: {fault.reason}"


def _with_quoted_line_breaks(parts: Sequence[Sequence[Segment]], format: TextFormat, schema: ClickSchema) -> list[str]:
    """Returns the URLs of the files, among those that were divided, in which a line ends within quotes."""
    quoting = format.quoting(schema.layout)
    assert quoting is not None
    segments = [segment for part in parts for segment in part]
    divided = [each for each in segments if each.start or each.stop < each.source.size_bytes]
    return [each.source.url for each in divided if has_quoted_line_break(each, quoting)]
