"""The formats npy and safetensors: one array of all vectors, and the words in a separate file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from embedtrain.export.formats.text import joined_columns, refuse_words
from embedtrain.export.vectors import Vectors

_BORDER = re.compile(r"[\t\n\r]|^\ufeff")
_REASON = "a word must not contain a tab or a line break, or begin with U+FEFF"
_WORDS_AT_ONCE = 1 << 16


def write_npy(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes a float32 array [num_rows, dim] that `numpy.load` reads or memory-maps, and the vocabulary."""
    file, vocabulary = files
    write_vocabulary(vectors, vocabulary, "npy")
    header = {"descr": "<f4", "fortran_order": False, "shape": (vectors.num_rows, vectors.dim)}
    np.lib.format.write_array_header_1_0(file, header)
    _write_values(vectors, file)


def write_safetensors(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes the tensor `vectors`, float32 [num_rows, dim], and the vocabulary.

    Source: https://huggingface.co/docs/safetensors/index#format
    """
    file, vocabulary = files
    write_vocabulary(vectors, vocabulary, "safetensors")
    num_bytes = 4 * vectors.num_rows * vectors.dim
    tensor = {"dtype": "F32", "shape": [vectors.num_rows, vectors.dim], "data_offsets": [0, num_bytes]}
    header = json.dumps({"vectors": tensor}).encode()
    header += b" " * (-len(header) % 8)  # Readers memory-map the values, which must be aligned to 8 bytes.
    file.write(len(header).to_bytes(8, "little") + header)
    _write_values(vectors, file)


def write_vocabulary(vectors: Vectors, file: BinaryIO, format_name: str) -> None:
    """Writes one line per row: the word and, if it is known, a tab and the count."""
    for start in range(0, vectors.num_rows, _WORDS_AT_ONCE):
        words = vectors.words[start : start + _WORDS_AT_ONCE]
        refuse_words(words, _BORDER, format_name, _REASON)
        columns = [pa.array(words, pa.string())]
        if vectors.counts is not None:
            columns.append(pa.array(vectors.counts[start : start + _WORDS_AT_ONCE]).cast(pa.string()))
        file.write(joined_columns(columns, "\t"))


def _write_values(vectors: Vectors, file: BinaryIO) -> None:
    for _, rows in vectors.blocks():
        file.write(rows.astype("<f4", copy=False).data)
