"""Drafts the section `data` of models of users and items, for data files with columns."""

from __future__ import annotations

import math
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
_TIMES = re.compile(
    r"(?i:(^|[_\W])(time|timestamp|datetime|date|ts|created|unix\w*)($|[_\W])|_at$)|[a-z](Time|Timestamp|Date|At)$"
)
_EXACT_TIMES = ("timestamp", "time", "datetime", "ts", "event_time", "event_timestamp", "date")
_ATTRIBUTES = re.compile(r"birth|born|release|zone|spent|signup|id$|day_of|length|duration", re.IGNORECASE)
"""Columns with these names say something of a user or an item, or how long something took."""
_LEAST_TIME = 1e8
"""Numbers in a column of times with another name than `_EXACT_TIMES` are at least this: seconds since 1970 are."""


class Events(NamedTuple):
    """Names the columns of interactions; `time` is None if no column looks like times."""

    user: Column
    item: Column
    time: str | None


def events_of(path: str, found: Survey, label: str | None, model: str) -> Events:
    """Guesses the columns of users, items and times.

    Raises:
        UserError: there are no such columns, or a label is named.
    """
    if label is not None:
        raise UserError(f"--label needs a model that predicts a column; {model} predicts items")
    times = [name for name in found.times if not _ATTRIBUTES.search(name)]
    times += [column.name for column in found.columns if _is_of_times(column)]
    time = min(times, key=_rank_of_time, default=None)
    sides = _sides_of([column for column in found.columns if column.name != time and not _TIMES.search(column.name)])
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
    values = {column.name: of_values(column, found) for column in found.columns}
    if events.time is None:
        unlike = next(
            (f"{in_comment(name)} does not hold" for name in values if _TIMES.search(name)), "no column holds"
        )
        why = f"{unlike} a time of the interaction in every row: the order of the lines counts"
        yield commented("  time_column: null", why)
    else:
        shown = values.get(events.time, "the file says that it holds times")
        yield commented(f"  time_column: {scalar(events.time)}", f"guessed: {shown}")
    if found.is_all and all(count < 2 for _, count in events.user.counts):
        yield commented("  split: none", "no user has a second line to hold out")
    else:
        yield commented("  split: leave_one_out", "each user's newest item is the test part")
    for name, shown in values.items():
        if name not in (events.user.name, events.item.name, events.time):
            yield f"  # not used: {in_comment(name)}, {shown}"
    yield ""


def _rank_of_time(name: str) -> int:
    return [*_EXACT_TIMES, name.lower()].index(name.lower())


def _is_of_times(column: Column) -> bool:
    name = column.name
    if not _TIMES.search(name) or _ATTRIBUTES.search(name) or column.num_missing or not column.counts or column.is_bag:
        return False
    if column.kind != "text":
        return math.isfinite(column.greatest) and (name.lower() in _EXACT_TIMES or column.least >= _LEAST_TIME)
    texts = pa.array([text for text, _ in column.counts], pa.large_string())
    try:
        parse_times(texts, column.name, str)
    except UserError:
        return False
    return True


def _sides_of(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Returns the columns of users and of items, chosen by name, or else the first columns that look like ids."""
    ids = [column for column in columns if column.kind in ("integer", "text")]
    user, item = _named(ids, _USERS), _named(ids, _ITEMS)
    rest = [column for column in ids if column not in (user, item) and column.num_values]
    rest.sort(key=lambda column: not is_id(column))
    user = user or (rest.pop(0) if rest else None)
    item = item or (rest.pop(0) if rest else None)
    return None if user is None or item is None else (user, item)


def _named(columns: Sequence[Column], words: Sequence[str]) -> Column | None:
    """Returns the column with one of the words as its name, or else as its name beside `id`, or else in its name."""
    for pattern in (r"{}s?", r"({0}s?[_ ]?(id|no|code|key|number)|id[_ ]?{0})", r".*{}.*"):
        for word in words:
            for column in columns:
                if re.fullmatch(pattern.format(word), column.name, re.IGNORECASE):
                    return column
    return None
