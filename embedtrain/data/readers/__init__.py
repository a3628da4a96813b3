"""Readers of files of rows: `FORMATS[name].read` yields record batches with line numbers for any format.

A format is one module here and one entry of `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from embedtrain.data.readers.csv import Csv
from embedtrain.data.readers.jsonl import JsonLines
from embedtrain.data.readers.lines import Lines
from embedtrain.data.readers.parquet import Parquet
from embedtrain.data.readers.recbole import RecBole
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
    "require_columns",
    "require_format",
    "suffixes_of",
]

FORMATS: dict[str, Format] = {
    "lines": Lines(),
    "csv": Csv(),
    "tsv": Tsv(),
    "parquet": Parquet(),
    "jsonl": JsonLines(),
    "recbole": RecBole(),
}

AUTO = "auto"
"""Stands for the format of a file's suffix."""


def format_of(source: Source, name: str) -> Format:
    """Returns the format of a name, or for "auto" of a file's suffix.

    Raises:
        UserError: the format or the suffix is unknown.
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
    """Returns the suffixes of the files of a format in a folder; see `expand_sources`."""
    if name == AUTO:
        return tuple(suffix for format in FORMATS.values() for suffix in format.suffixes)
    require_format(name)
    return FORMATS[name].suffixes + FORMATS[name].other_suffixes


def require_format(name: str, others: tuple[str, ...] = (), key: str = "", *, with_names: bool = False) -> None:
    """Raises UserError unless `name` is a format or one of `others`.

    Args:
        name: name of the format.
        others: other allowed names.
        key: the setting, for the message.
        with_names: whether only formats with named columns are allowed.
    """
    allowed = [*others, *(each for each, format in FORMATS.items() if format.has_names or not with_names)]
    if name not in allowed:
        where = f"{key}: " if key else ""
        raise UserError(f"{where}expected a format of {', '.join(allowed)}, got {name!r}")


def require_columns(
    source: Source, wanted: Sequence[str], existing: Sequence[str], format: str, keys: Mapping[str, str]
) -> None:
    """Checks that a file has the wanted columns.

    Args:
        source: the file.
        wanted: the columns to read.
        existing: its columns.
        format: the format in which it was read, or "auto".
        keys: the setting that names each wanted column, such as "data.label".

    Raises:
        UserError: columns are missing; the message names the file, its columns and the settings.
    """
    missing = [name for name in wanted if name not in existing]
    if not missing:
        return
    message = f"{source.url}: there is no column {', '.join(map(repr, missing))}; its columns are " + (
        f"{', '.join(map(repr, existing))}"
    )
    if settings := list(dict.fromkeys(keys[name] for name in missing if name in keys)):
        message += f"; {', '.join(settings)} {'says' if len(settings) == 1 else 'say'} which to read"
        told = next((name for name, each in FORMATS.items() if suffix_of(source.url) in each.suffixes), format)
        if told not in (format, AUTO) and format != AUTO:
            message += f"; the file was read as {format}, and its name is one of {told}: give "
            message += f"{settings[0].partition('.')[0]}.format={told}"
    raise UserError(message)
