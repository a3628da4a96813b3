"""The file formats of exported vectors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import BinaryIO

from embedtrain.data.codecs import codec_of_name
from embedtrain.data.readers.compression import PACKERS
from embedtrain.errors import UserError
from embedtrain.export.formats.arrays import write_npy, write_safetensors
from embedtrain.export.formats.parquet import write_parquet
from embedtrain.export.formats.projector import FILE_NAMES, write_projector
from embedtrain.export.formats.word2vec import write_binary, write_glove, write_text
from embedtrain.export.storage import new_files, refuse_packed_name
from embedtrain.export.vectors import Vectors

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Format:
    """Describes a file format.

    Attributes:
        paths: returns the paths of the files of an export to `output`.
        write: writes these files, in the same order, block by block.
        max_rows: default maximum number of exported rows; None for all.
        may_be_packed: whether its readers decompress a file with the suffix of a compression.
    """

    paths: Callable[[str], list[str]]
    write: Callable[[Vectors, Sequence[BinaryIO]], None]
    max_rows: int | None = None
    may_be_packed: bool = False


def _one_file(output: str) -> list[str]:
    return [output]


def _with_vocabulary(output: str) -> list[str]:
    return [output, f"{output}.vocabulary.tsv"]


def _projector_files(output: str) -> list[str]:
    return [f"{output.rstrip('/')}/{name}" for name in FILE_NAMES]


FORMATS: Mapping[str, Format] = {
    "word2vec": Format(_one_file, write_text, may_be_packed=True),
    "word2vec-binary": Format(_one_file, write_binary, may_be_packed=True),
    "glove": Format(_one_file, write_glove, may_be_packed=True),
    "npy": Format(_with_vocabulary, write_npy),
    "safetensors": Format(_with_vocabulary, write_safetensors),
    "parquet": Format(_one_file, write_parquet),
    # With more points the projector in the browser becomes unresponsive.
    "projector": Format(_projector_files, write_projector, max_rows=10_000),
}


def export_vectors(
    vectors: Vectors, format: str, output: str, *, overwrite: bool = False, max_rows: int | None = None
) -> list[str]:
    """Writes vectors in a format of other programs; memory use does not grow with the table.

    Args:
        vectors: the vectors to export.
        format: "word2vec", "word2vec-binary", "glove", "npy", "safetensors", "parquet" or "projector".
        output: path or fsspec URL of the new file, or of a folder for `projector`. The suffixes .gz, .bz2, .xz and .zst
            compress the formats of word2vec and GloVe; other formats refuse them.
        overwrite: whether to replace existing files.
        max_rows: exports only this many first rows (the most frequent words); None for the format's own limit.

    Returns:
        The paths written. A failed export leaves none of them.

    Raises:
        UserError: the format is unknown, the output exists or cannot be written, or the format cannot hold a word.
    """
    if format not in FORMATS:
        raise UserError(f"unknown export format {format!r}: use one of {', '.join(FORMATS)}")
    chosen = FORMATS[format]
    limit = vectors.num_rows if max_rows is None else max_rows
    if limit < 1:
        raise UserError(f"max_rows must be at least 1, got {limit}")
    if max_rows is None and chosen.max_rows is not None and chosen.max_rows < limit:
        limit = chosen.max_rows
        _logger.warning(
            f"{format}: exporting only the first {limit:,} of {vectors.num_rows:,} rows, because it cannot show more; "
            f"set max_rows for another number"
        )
    if not chosen.may_be_packed:
        refuse_packed_name(output, format)
    paths = chosen.paths(output)
    codec = codec_of_name(output)
    with new_files(paths, overwrite) as files, ExitStack() as stack:
        if codec is not None:
            files = [stack.enter_context(PACKERS[codec](file)) for file in files]
        chosen.write(vectors.first(limit), files)
    return paths


"""How vectors are written to files, by the name that a user gives for `--format`."""
