"""A stream of clicks, read once as it arrives: standard input, or a folder to which files are added."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from embedtrain.data.click_batches import ClickBatch, as_batch
from embedtrain.data.click_log import BAG_LENGTHS, FIRST_VALUE, ClickLayout, Records
from embedtrain.data.click_records import encode_rows
from embedtrain.data.click_schema import ClickSchema
from embedtrain.data.partition import share_of_rank
from embedtrain.data.readers import FORMATS, Rows, TextFormat
from embedtrain.data.readers.quotes import find_line_ends
from embedtrain.data.stream import Lines, LineStream, StreamPosition
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError
from embedtrain.schema import Count, parse

_logger = logging.getLogger(__name__)

_FAULTS_SHOWN = 3
_NOTHING = Lines([], [])


@dataclass(frozen=True)
class StreamOptions:
    """Says how to read a stream of clicks.

    Attributes:
        path: "-" for standard input; or a file, or a folder, on any fsspec URL.
        lines_per_step: number of lines per step over all ranks.
        poll_seconds: seconds between two looks for new files in the folder; None ends the run after the last file.
        max_bad_lines: maximum number of bad lines to skip; one more ends the run.
    """

    path: str
    lines_per_step: int
    poll_seconds: float | None = None
    max_bad_lines: int = 0


@dataclass(frozen=True)
class _Counted:
    """The fields of a position in addition to `StreamPosition`."""

    bad_lines: Count = 0


class ClickStream(ClickLayout):
    """Yields the steps of a stream; each example is in exactly one step.

    Rank 0 reads the stream and sends the lines of a step to all ranks; each rank trains on its part of them. A step
    consists of the next lines in order, so steps do not depend on the number of ranks. The stream is not known in
    advance: there are no vocabularies, and numbers are transformed but not normalised, unless the run was started from
    another run that knew their means.

    Args:
        options: how to read.
        schema: the columns, of a text format.
        ranks: the ranks among which a step is divided.
        moments: means and standard deviations of the dense columns, each [num_dense] float64; None for 0 and 1.

    Raises:
        UserError: the schema has a vocabulary, which needs the data in advance.
    """

    def __init__(
        self,
        options: StreamOptions,
        schema: ClickSchema,
        ranks: Ranks,
        moments: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None,
    ) -> None:
        self._format = _streamed_format(schema)
        self.num_rows = {column.name: column.num_rows or 0 for column in schema.categorical}
        self.dense_names = list(schema.dense)
        self.dense_mean, self.dense_std = moments or (np.zeros(len(schema.dense)), np.ones(len(schema.dense)))
        self.single_names = [column.name for column in schema.single]
        self.bag_names = [column.name for column in schema.bags]
        self.vocabulary_fingerprint = ""
        given = "" if moments is None else f" {[numbers.tolist() for numbers in moments]}"
        self.fingerprint = xxhash.xxh3_128_hexdigest(f"stream {schema.facts}{given}".encode())
        self._options = options
        self._schema = schema
        self._ranks = ranks
        self._lines: LineStream | None = None
        self._num_bad = 0

    def next_batch(self, position: Mapping[str, Any]) -> tuple[ClickBatch | None, Mapping[str, Any], bool]:
        """Reads the next step.

        Collective: every rank.

        Args:
            position: where to continue, as returned by the previous call or kept in a checkpoint; empty to start.

        Returns:
            This rank's batch, or None if its lines have not arrived within about a second or the stream has ended; the
            position of the next step; and whether the stream has ended.

        Raises:
            UserError: on every rank; the stream cannot be read or has too many bad lines.
        """
        found = self._ranks.run_on_first(lambda: self._read(position))
        if found is None:
            return None, position, False
        lines, reached = found
        if not lines.texts:
            return None, position, True
        records, bad = self._parse(lines)
        # Every rank finds and counts the same bad lines.
        num_bad = parse(_Counted, dict(position)).bad_lines + len(bad)
        self._judge(bad, num_bad, lines)
        num_global = len(records.examples)
        mine = share_of_rank(num_global, self._ranks.rank, self._ranks.size)
        batch = as_batch(_slice(records, mine), self, num_global)
        return batch, {**reached, "bad_lines": num_bad}, False

    def _read(self, position: Mapping[str, Any]) -> tuple[Lines, dict[str, Any]] | None:
        """Returns the lines of a step and the position after them; called on rank 0 only."""
        if self._lines is None:
            self._lines = LineStream(
                self._options.path,
                parse(StreamPosition, dict(position)),
                poll_seconds=self._options.poll_seconds,
                quoting=self._format.quoting(self._schema.layout),
            )
        lines = self._lines.take(self._options.lines_per_step)
        return None if lines is None else (lines, vars(self._lines.position))

    def _parse(self, lines: Lines) -> tuple[Records, dict[int, str]]:
        """Returns the records of the usable lines, and the reasons for bad lines by their index."""
        schema, path = self._schema, self._options.path
        block = "".join(f"{text}\n" for text in lines.texts).encode()
        columns = schema.columns or schema.used_columns
        try:
            parsed = self._format.parse(block, schema.used_columns, columns, schema.layout, schema.uses)
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{lines.place(0)} and the {len(lines.texts) - 1} lines after it: {reason}") from error
        records, unusable = encode_rows(Rows(parsed.batch, 0, parsed.find_lines), schema, {}, path)
        bad = {**parsed.wrong, **unusable}
        if bad and parsed.num_lines > len(lines.texts):
            # A record with a quoted line break spans several lines.
            begins = np.cumsum([0, *(len(find_line_ends(text.encode())) + 1 for text in lines.texts)])
            bad = {int(np.searchsorted(begins, line, side="right")) - 1: reason for line, reason in bad.items()}
        return records, {**bad, **lines.wrong}

    def _judge(self, bad: Mapping[int, str], num_bad: int, lines: Lines) -> None:
        """Refuses a stream with too many bad lines; warns on rank 0 of skipped lines."""
        if not bad:
            return
        shown = "; ".join(f"{lines.place(line)}: {bad[line]}" for line in sorted(bad)[:_FAULTS_SHOWN])
        if num_bad > self._options.max_bad_lines:
            raise UserError(
                f"{shown}. {num_bad} bad lines so far exceed data.max_bad_lines="
                f"{self._options.max_bad_lines}: correct them, or raise data.max_bad_lines to skip them"
            )
        if self._ranks.rank == 0:
            _logger.warning(f"skipped {num_bad} bad lines so far, for example {shown}")


def _streamed_format(schema: ClickSchema) -> TextFormat:
    """Returns the format of a stream's lines; refuses a schema that needs more than single lines."""
    format = FORMATS[schema.reader]
    if not isinstance(format, TextFormat):
        raise UserError(f"data.format={schema.file_format} cannot be streamed: use a format of lines")
    if schema.columns is None and format.has_header:
        raise UserError("a stream has no first line with column names: give data.columns, in order")
    learnt = [column.name for column in schema.categorical if column.encoding == "vocabulary"]
    if learnt:
        raise UserError(
            f"the values of a stream are not known in advance, so {', '.join(learnt)} cannot have a vocabulary: give "
            "data.num_rows, or data.features.NAME.num_rows, to hash them"
        )
    return format


def _slice(records: Records, mine: range) -> Records:
    examples = records.examples[mine.start : mine.stop]
    if not len(examples) or not records.values.size:
        return Records(examples, records.values[:0])
    begin = int(examples[FIRST_VALUE][0])
    end = int(examples[FIRST_VALUE][-1]) + int(examples[BAG_LENGTHS][-1].sum())
    return Records(examples, records.values[begin:end])
