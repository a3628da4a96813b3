"""Formats vectors and words as lines of text with Arrow kernels, without a Python loop over values."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedtrain.errors import UserError
from embedtrain.export.vectors import FloatRows


def joined_rows(rows: FloatRows, separator: str) -> pa.StringArray:
    """Returns one string per row of `rows` [n, dim]: its values joined by `separator`.

    Each value is the shortest text that reads back as the same float32.
    """
    offsets = np.arange(0, rows.size + 1, rows.shape[1], dtype=np.int32)
    values = pc.cast(pa.array(rows.ravel()), pa.string())
    return pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), values), separator)


def joined_columns(columns: Sequence[pa.StringArray], separator: str) -> memoryview:
    """Returns lines of UTF-8 text: the strings of all columns, joined by `separator`."""
    lines = pc.binary_join_element_wise(pc.binary_join_element_wise(*columns, separator), "", "\n")
    _, offsets, text = lines.buffers()
    end = int(np.frombuffer(offsets, dtype=np.int32)[len(lines)])
    return memoryview(text)[:end]


def refuse_words(words: Sequence[str], pattern: re.Pattern[str], format_name: str, reason: str) -> None:
    """Raises UserError for the first word that matches `pattern`, which readers of the format would misread."""
    for word in words:
        if pattern.search(word):
            raise UserError(
                f"the format {format_name} cannot hold the word {word!r}: {reason}; use the format parquet, which "
                "can hold any word"
            )
