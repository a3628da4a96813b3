"""Reading the files of a click log: dividing them into parts, and reading the rows of a part."""

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
    """The parts of a click log; they do not depend on the number of ranks.

    Attributes:
        parts: the parts in order; each is a list of segments (bytes of a text file, row groups of a Parquet file).
        columns: column names per source URL.
    """

    parts: list[list[Segment]]
    columns: dict[str, tuple[str, ...]]


def plan_files(sources: Sequence[Source], schema: ClickSchema, part_bytes: int, ranks: Ranks) -> ClickFiles:
    """Divides files into parts and checks that each file has the schema's columns.

    A text file is divided at line ends unless a quoted field contains a line end. To find out, the ranks read each
    file once more if the layout has quotes.

    Collective: every rank.

    Raises:
        UserError: a file lacks a column or has another format.
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
    """Reads a segment, a few MiB at a time; lines with a wrong number of fields are added to `faults`.

    Raises:
        UserError: the file cannot be parsed.
    """
    format = FORMATS[schema.reader]
    return format.read(
        segment, schema.used_columns, columns, schema.layout, faults, chunk_bytes=chunk_bytes, uses=schema.uses
    )


def describe_fault(fault: Fault, schema: ClickSchema) -> str:
    """Returns file, line (from 1; in Parquet the row, from 0) and reason of a fault, for messages."""
    return f"{FORMATS[schema.reader].place(fault)}: {fault.reason}"


def _with_quoted_line_breaks(parts: Sequence[Sequence[Segment]], format: TextFormat, schema: ClickSchema) -> list[str]:
    """Returns the URLs of divided files in which a quoted field contains a line end."""
    quoting = format.quoting(schema.layout)
    assert quoting is not None
    segments = [segment for part in parts for segment in part]
    divided = [each for each in segments if each.start or each.stop < each.source.size_bytes]
    return [each.source.url for each in divided if has_quoted_line_break(each, quoting)]
