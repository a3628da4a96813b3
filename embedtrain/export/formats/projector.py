"""The format projector: a folder that `tensorboard --logdir FOLDER` shows in its embedding projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO

from embedtrain.export.formats.arrays import write_vocabulary
from embedtrain.export.formats.text import joined_columns, joined_rows
from embedtrain.export.vectors import Vectors

FILE_NAMES = ("vectors.tsv", "metadata.tsv", "projector_config.pbtxt")

_CONFIG = """embeddings {{
  tensor_name: {name}
  tensor_path: "vectors.tsv"
  metadata_path: "metadata.tsv"
}}
"""


def write_projector(vectors: Vectors, files: Sequence[BinaryIO]) -> None:
    """Writes the values and the words as tab-separated text, and the projector's configuration."""
    values, metadata, config = files
    if vectors.counts is not None:
        metadata.write(
            b"word\tcount\n"
        )  # The projector needs a header for two columns and must not get one for a single column.
    write_vocabulary(vectors, metadata, "projector")
    for _, rows in vectors.blocks():
        values.write(joined_columns([joined_rows(rows, "\t")], "\t"))
    name = '"' + vectors.table.replace("\\", "\\\\").replace('"', '\\"') + '"'
    config.write(_CONFIG.format(name=name).encode())
