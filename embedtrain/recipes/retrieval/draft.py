"""Drafts a configuration of retrieval for data files with columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from embedtrain.data.survey import Column, Survey
from embedtrain.errors import UserError
from embedtrain.recipes.draft import commented, head, in_comment, is_id, layout, of_values, scalar

_USERS = ("user", "customer", "member", "visitor", "client", "session", "account", "reader")
_ITEMS = ("item", "product", "movie", "article", "track", "song", "book", "video", "business", "page", "sku", "anime")


def draft(path: str, found: Survey, label: str | None) -> Iterator[str]:
    """Yields the lines of a configuration; see `Recipe.draft`."""
    if label is not None:
        raise UserError("--label needs a model that predicts a column; retrieval predicts items")
    return _retrieval(path, found)


def _retrieval(path: str, found: Survey) -> Iterator[str]:
    sides = _sides_of(found.columns)
    if sides is None:
        names = ", ".join(column.name for column in found.columns)
        raise UserError(f"{path}: expected a column of users and one of items, got the columns {names}")
    user, item = sides
    for column, held in ((user, "users"), (item, "items")):
        if not column.num_values:
            raise UserError(f"{path}: the column {column.name}, which should hold {held}, has no value")
    yield from head("retrieval", path, found)
    yield "data:"
    yield f"  path: {scalar(path)}"
    yield from layout(found)
    yield commented(f"  user_column: {scalar(user.name)}", f"guessed: {of_values(user, found)}")
    yield commented(f"  item_column: {scalar(item.name)}", f"guessed: {of_values(item, found)}")
    for column in found.columns:
        if column not in sides:
            yield f"  # not used: {in_comment(column.name)}, {of_values(column, found)}"
    yield ""
    yield "evaluate:"
    yield commented("  path: null", "files of held-out interactions with the same columns")
    yield ""
    yield "table:"
    yield f"  dim: {32 if found.is_all else 64}"
    yield ""
    yield "train:"
    yield commented("  epochs: 20", "passes over the data")
    yield commented(f"  global_batch_size: {64 if user.num_values < 5000 else 512}", "users per step, over all ranks")


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
