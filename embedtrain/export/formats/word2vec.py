"""The text formats of word2vec and GloVe, and the binary format of word2vec; gensim reads all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa

from embedtrain.export.formats.text import joined_columns, joined_rows, refuse_words
from embedtrain.export.vectors import Vectors

_BORDER = re.compile(r"[\t\n\v\f\r ]|^$")
"""Readers of these formats end a word at ASCII white space only, not at other spaces such as U+00A0."""

_BORDER_WITHOUT_HEADER = re.compile(rf"{_BORDER.pattern}|^\ufeff")
"""U+FEFF at the beginning of a file is a byte-order mark."""

_REASON = (
    "a word must not be empty or contain ASCII white space, and a file must not begin with U+FEFF, which is a "
    "byte-order mark"
)


def write_text(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes a header line `num_rows dim`, then one line per row: the word and its values, separated by spaces."""
    (file,) = files
    file.write(_header(vectors))
    _write_lines(vectors, file, "word2vec", _BORDER)


def write_glove(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes lines like `write_text`, without the header line."""
    (file,) = files
    _write_lines(vectors, file, "glove", _BORDER_WITHOUT_HEADER)


def _write_lines(vectors: Vectors, file: BinaryIO, format_name: str, border: re.Pattern[str]) -> None:
    for start, rows in vectors.blocks():
        words = vectors.words[start : start + len(rows)]
        refuse_words(words, border, format_name, _REASON)
        file.write(joined_columns([pa.array(words, pa.string()), joined_rows(rows, " ")], " "))


def write_binary(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes a header line `num_rows dim`, then per row the word, a space, little-endian float32 values, a newline."""
    (file,) = files
    file.write(_header(vectors))
    for start, rows in vectors.blocks():
        words = vectors.words[start : start + len(rows)]
        refuse_words(words, _BORDER, "word2vec-binary", _REASON)
        values = rows.astype("<f4", copy=False)
        file.write(
            b"".join(b"%b %b\n" % (word.encode(), row.tobytes()) for word, row in zip(words, values, strict=True))
        )


def _header(vectors: Vectors) -> bytes:
    return f"{vectors.num_rows} {vectors.dim}\n".encode()
