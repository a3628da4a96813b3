"""Converts the settings of a section to the layout of its files' rows."""

from __future__ import annotations

from typing import Protocol

from embedtrain.data.readers import FORMATS, Layout
from embedtrain.errors import UserError


class RowsSection(Protocol):
    """Describes a section of a configuration for files of rows, which may also have `columns` and `delimiter`."""

    format: str
    quote: str | None


def layout_of(section: RowsSection, key: str) -> Layout:
    """Returns the layout that a section describes.

    Args:
        section: the section.
        key: name of the section in the configuration, such as "data".

    Raises:
        UserError: a setting cannot be used; the message names its key.
    """
    columns = getattr(section, "columns", None)
    try:
        layout = Layout(
            columns=None if columns is None else tuple(columns),
            delimiter=getattr(section, "delimiter", None),
            quote=section.quote,
        )
        format = FORMATS.get(section.format)
        if format is not None and format.has_header:
            layout.quoting(format.delimiter)  # Refuses a quote that is the delimiter of the format.
    except UserError as error:
        raise UserError(f"{key}.{error}") from error
    return layout
