"""The two formats of the word2vec program, which gensim's `KeyedVectors.load_word2vec_format` reads, and GloVe's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa

from embedtrain.export.formats.text import joined_columns, joined_rows, refuse_words
from embedtrain.export.vectors import Vectors

_BORDER = re.compile(r"[\t\n\v\f\r ]|^$")
"""gensim and the programs of word2vec and GloVe end a word at these, and not at other spaces, such as U+00A0."""

_BORDER_WITHOUT_HEADER = re.compile(rf"{_BORDER.pattern}|^\ufeff")
"""At the beginning of a file U+FEFF is no letter, but a byte-order mark."""

_REASON = (
    "its readers need words that are not empty, end them at ASCII white space, and take U+FEFF at the beginning of a "
    "file for a byte-order mark"
)


def write_text(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes `rows dim`, then a line for each row: the word and its values, separated by one space."""
    (file,) = files
    file.write(_header(vectors))
    _write_lines(vectors, file, "word2vec", _BORDER)


def write_glove(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes a line for each row, as `write_text` does, without a first line that counts them."""
    (file,) = files
    _write_lines(vectors, file, "glove", _BORDER_WITHOUT_HEADER)


def _write_lines(vectors: Vectors, file: BinaryIO, format_name: str, border: re.Pattern[str]) -> None:
    for start, rows in vectors.blocks():
        words = vectors.words[start : start + len(rows)]
        refuse_words(words, border, format_name, _REASON)
        file.write(joined_columns([pa.array(words, pa.string()), joined_rows(rows, " ")], " "))


def write_binary(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes `rows dim`, then for each row the word, a space, little-endian float32 values and a newline."""
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
