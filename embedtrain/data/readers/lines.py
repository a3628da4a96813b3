"""The format lines: `user item item ...`, separated by white space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedtrain.data.readers.rows import Layout, Parsed, TextFormat, Uses
from embedtrain.data.sources import Source
from embedtrain.errors import UserError


class Lines(TextFormat):
    """Reads one row per item of a line: the line's user and the item."""

    suffixes = (".txt",)
    other_suffixes = ("",)
    has_names = False

    def columns(self, source: Source, names: Sequence[str], layout: Layout) -> tuple[str, ...]:
        """See `Format.columns`: the two columns get the requested names."""
        if len(names) != 2:
            raise UserError(
                f"{source.url}: lines have two columns, user and item, but {len(names)} are requested: "
                f"{', '.join(map(repr, names))}; leave out the settings that name the others"
            )
        return tuple(names)

    def parse(
        self,
        block: bytes,
        names: Sequence[str],
        columns: tuple[str, ...],
        layout: Layout,
        uses: Uses,
    ) -> Parsed:
        """See `TextFormat.parse`."""
        lines = pa.array(block.removesuffix(b"\n").split(b"\n"), pa.large_binary()).cast(pa.large_string())
        words = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(lines))
        lengths = np.asarray(pc.list_value_length(words))
        values = words.flatten()
        is_first = np.zeros(len(values), bool)
        starts = np.cumsum(lengths) - lengths
        # An empty line is split into one empty word.
        is_first[starts] = True
        users = values.filter(pa.array(is_first))
        of_line = np.repeat(np.arange(len(lengths)), np.maximum(lengths - 1, 0))
        found = [users.take(pa.array(of_line)), values.filter(pa.array(~is_first))]
        return Parsed(pa.RecordBatch.from_arrays(found, names=list(names)), len(lines), {}, lambda: of_line)
