"""The head of data: their first MiBs as files of their own, to try a run on."""

from __future__ import annotations

import os
from collections.abc import Sequence

from embedtrain.data.codecs import without_compression
from embedtrain.data.readers import Layout, format_of, suffixes_of
from embedtrain.data.readers.blocks import read_chunks, write_first
from embedtrain.data.sources import CHUNK_BYTES, TEXT_SUFFIXES, Source, expand_sources

TEXT = "text"
"""Stands for files of words, which are no rows."""


def write_head(
    path: str | Sequence[str], format: str, folder: str, max_bytes: int, layout: Layout | None = None
) -> list[str] | None:
    """Copies the first lines or rows of the files that a path means; returns the copies, None if that is all.

    Args:
        path: as `expand_sources` takes it.
        format: of the files: "text", a name in `FORMATS` or "auto".
        folder: a local folder that exists, to write to.
        max_bytes: about how much to copy. Files that are not larger than that, all together, are not copied: they are
            their own head.
        layout: of the lines of text.

    Raises:
        UserError: a path means no file, or a file cannot be read as its format says.
    """
    sources = expand_sources(path, TEXT_SUFFIXES if format == TEXT else suffixes_of(format))
    if sum(source.size_bytes for source in sources) <= max_bytes and not any(source.compression for source in sources):
        return None
    copies: list[str] = []
    left = max_bytes
    for number, source in enumerate(sources):
        if left < max_bytes // 16:  # a copy ends with a line, so the earlier ones may be a little too short
            break
        name = without_compression(os.path.basename(source.url.partition("::")[0]))
        copies.append(os.path.join(folder, f"{number:05d}-{name}"))
        if format == TEXT:
            left -= _copy_text(source, copies[-1], left)
        else:
            left -= format_of(source, format).copy_head(source, copies[-1], layout or Layout(), left)
    return copies


def _copy_text(source: Source, path: str, max_bytes: int) -> int:
    chunks = read_chunks(source, 0, source.size_bytes, chunk_bytes=min(CHUNK_BYTES, max_bytes))
    return write_first(chunks, path, max_bytes)
