"""Shared code of recipes for drafting a configuration, in which comments explain each guess about columns."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from embedtrain.data.survey import Column, Survey

_IDS = re.compile(r"(^|[_\W])(id|code|zip|zipcode|postcode|key|hash|uuid|no)$|Id$|ID$", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*")
_COLUMN = 34
"""Column of the comments; further right after a longer line."""


def head(model: str, path: str, found: Survey) -> Iterator[str]:
    """Yields the first lines of a configuration."""
    seen = f"all {found.num_rows:,} rows" if found.is_all else f"the first {found.num_rows:,} rows"
    yield f"# Drafted by `embedtrain init` from {seen} of {in_comment(path)}: check the guesses, and correct them."
    yield "# For all settings see docs/settings.md and `embedtrain config show FILE`."
    yield from (f"# {on_one_line(remark)}" for remark in found.remarks)
    yield ""
    yield f"model: {model}"
    yield ""


def layout(found: Survey) -> Iterator[str]:
    """Yields the lines for the format and layout of the files."""
    yield f"  format: {found.format}"
    if found.layout.delimiter is not None:
        yield f"  delimiter: {scalar(found.layout.delimiter, quoted=True)}"
    if not found.has_names:
        names = ", ".join(found.layout.columns or ())
        yield "  # The first line holds values, not names of columns: replace these names by better ones."
        yield f"  columns: [{names}]"


def is_id(column: Column) -> bool:
    """Returns whether a column of integers has a name like a column of ids."""
    return column.kind == "integer" and _IDS.search(column.name) is not None


def of_numbers(column: Column) -> str:
    """Returns a remark on a column of numbers."""
    missing = f", {column.num_missing:,} missing" if column.num_missing else ""
    return f"numbers from {column.least:g} to {column.greatest:g}{missing}"


def of_values(column: Column, found: Survey) -> str:
    """Returns a remark on the values of a column."""
    example = f", such as {in_comment(column.counts[0][0])}" if column.counts else ""
    missing = f", {column.num_missing:,} {'empty' if column.is_bag else 'missing'}" if column.num_missing else ""
    where = "" if found.is_all else f" in {found.num_rows:,} rows"
    strange = ""
    if column.strange:
        texts = " and ".join(
            f"{in_comment(text)} ({count:,} {'row' if count == 1 else 'rows'})" for text, count in column.strange
        )
        strange = f"; values look like numbers except {texts}"
    return f"{column.num_values:,} values{where}{example}{missing}{strange}"


def commented(line: str, comment: str) -> str:
    """Returns a line with a comment behind it."""
    return f"{line:<{_COLUMN}} # {comment}"


def in_comment(text: str) -> str:
    """Returns a text, shortened to 40 characters, in a form that fits on one line of a comment."""
    shown = text if text.isprintable() and text else json.dumps(text)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def on_one_line(text: str) -> str:
    """Returns a text of any length in a form that fits on one line of a comment."""
    return text if text.isprintable() else json.dumps(text)[1:-1]


def scalar(text: str, *, quoted: bool = False) -> str:
    """Returns a text as a YAML scalar."""
    if not quoted and _PLAIN.fullmatch(text) and text != "null":
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
