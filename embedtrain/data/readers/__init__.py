"""Files of rows in several formats, read alike: `FORMATS[name].read` yields record batches with file and line.

A format is one file here, and one entry of `FORMATS`.
"""

from __future__ import annotations

from embedtrain.data.readers.csv import Csv
from embedtrain.data.readers.jsonl import JsonLines
from embedtrain.data.readers.lines import Lines
from embedtrain.data.readers.parquet import Parquet
from embedtrain.data.readers.rows import Fault, Format, Layout, Rows, TextFormat
from embedtrain.data.readers.tsv import Tsv
from embedtrain.data.sources import Source, suffix_of
from embedtrain.errors import UserError

__all__ = [
    "AUTO",
    "FORMATS",
    "Fault",
    "Format",
    "Layout",
    "Rows",
    "TextFormat",
    "format_of",
    "require_format",
    "suffixes_of",
]

FORMATS: dict[str, Format] = {
    "lines": Lines(),
    "csv": Csv(),
    "tsv": Tsv(),
    "parquet": Parquet(),
    "jsonl": JsonLines(),
}

AUTO = "auto"
"""Stands for the format that a file's suffix tells."""


def format_of(source: Source, name: str) -> Format:
    """Returns the format of a file, by its name or by the file's suffix.

    Raises:
        UserError: there is no such format, or the suffix tells none.
    """
    if name != AUTO:
        require_format(name)
        return FORMATS[name]
    suffix = suffix_of(source.url)
    for format in FORMATS.values():
        if suffix in format.suffixes:
            return format
    raise UserError(
        f"{source.url}: cannot tell the format by the name: expected it to end in {', '.join(suffixes_of(AUTO))}, "
        f"or a format of {', '.join(FORMATS)}"
    )


def suffixes_of(name: str) -> tuple[str, ...]:
    """Returns the file name endings by which a folder's files are taken for a format; see `expand_sources`."""
    if name == AUTO:
        return tuple(suffix for format in FORMATS.values() for suffix in format.suffixes)
    require_format(name)
    return FORMATS[name].suffixes + FORMATS[name].other_suffixes


def require_format(name: str, others: tuple[str, ...] = (), key: str = "") -> None:
    """Raises UserError, with the key of the setting, if there is no format of this name, nor is it among `others`."""
    if name not in FORMATS and name not in others:
        where = f"{key}: " if key else ""
        raise UserError(f"{where}expected a format of {', '.join([*others, *FORMATS])}, got {name!r}")
