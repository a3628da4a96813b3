"""Drafts the section `data` of models of users and items, for data files with columns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pyarrow as pa

from embedtrain.data.survey import Column, Survey
from embedtrain.data.times import parse_times
from embedtrain.errors import UserError
from embedtrain.recipes.draft import commented, in_comment, is_id, layout, of_values, scalar

_USERS = ("user", "customer", "member", "visitor", "client", "session", "account", "reader")
_ITEMS = ("item", "product", "movie", "article", "track", "song", "book", "video", "business", "page", "sku", "anime")
_TIMES = re.compile(r"(^|[_\W])(time|timestamp|datetime|date|day|ts|created|when)($|[_\W])|(Time|Date|At)$|_at$", re.I)


class Events(NamedTuple):
    """Names the columns of interactions; `time` is None if no column looks like times."""

    user: Column
    item: Column
    time: Column | None


def events_of(path: str, found: Survey, label: str | None, model: str) -> Events:
    """Guesses the columns of users, items and times.

    Raises:
        UserError: there are no such columns, or a label is named.
    """
    if label is not None:
        raise UserError(f"--label needs a model that predicts a column; {model} predicts items")
    time = next(filter(_is_of_times, found.columns), None)
    sides = _sides_of([column for column in found.columns if column is not time])
    if sides is None:
        names = ", ".join(column.name for column in found.columns)
        raise UserError(f"{path}: expected a column of users and one of items, got the columns {names}")
    for column, held in zip(sides, ("users", "items"), strict=True):
        if not column.num_values:
            raise UserError(f"{path}: the column {column.name}, which should hold {held}, has no value")
    return Events(*sides, time)


def data_section(path: str, found: Survey, events: Events) -> Iterator[str]:
    """Yields the lines of the section `data`."""
    yield "data:"
    yield f"  path: {scalar(path)}"
    yield from layout(found)
    yield commented(f"  user_column: {scalar(events.user.name)}", f"guessed: {of_values(events.user, found)}")
    yield commented(f"  item_column: {scalar(events.item.name)}", f"guessed: {of_values(events.item, found)}")
    if events.time is None:
        yield commented("  time_column: null", "no column looks like times: the order of the lines counts")
    else:
        yield commented(f"  time_column: {scalar(events.time.name)}", f"guessed: {of_values(events.time, found)}")
    yield commented("  split: leave_one_out", "each user's newest item is the test part")
    for column in found.columns:
        if column not in events:
            yield f"  # not used: {in_comment(column.name)}, {of_values(column, found)}"
    yield ""


def _is_of_times(column: Column) -> bool:
    if not _TIMES.search(column.name) or column.num_missing or not column.counts or column.is_bag:
        return False
    if column.kind != "text":
        return True
    texts = pa.array([text for text, _ in column.counts[:1000]], pa.large_string())
    try:
        parse_times(texts, column.name, str)
    except UserError:
        return False
    return True


def _sides_of(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Returns the columns of users and of items, chosen by name, or else the first columns that look like ids."""
    ids = [column for column in columns if column.kind in ("integer", "text")]

    def named(words: Sequence[str]) -> Column | None:
        return next((column for word in words for column in ids if word in column.name.lower()), None)

    user, item = named(_USERS), named(_ITEMS)
    rest = [column for column in ids if column not in (user, item) and column.num_values]
    rest.sort(key=lambda column: not is_id(column))
    user = user or (rest.pop(0) if rest else None)
    item = item or (rest.pop(0) if rest else None)
    return None if user is None or item is None else (user, item)
