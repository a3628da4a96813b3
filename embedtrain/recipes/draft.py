"""A first configuration for files of rows: what their columns are is guessed, and said in comments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from embedtrain.data.survey import Column, Survey, survey
from embedtrain.errors import UserError

MODELS = ("ranking", "retrieval")
"""The models whose configurations can be drafted."""

_LABELS = (
    "label",
    "target",
    "click",
    "clicked",
    "is_click",
    "y",
    "class",
    "outcome",
    "converted",
    "income",
    "response",
)
_POSITIVES = ("1", "true", "yes", "y", "t", "positive", "click")
_USERS = ("user", "customer", "member", "visitor", "client", "session", "account", "reader")
_ITEMS = ("item", "product", "movie", "article", "track", "song", "book", "video", "business", "page", "sku", "anime")
_IDS = re.compile(r"(^|[_\W])(id|code|zip|zipcode|postcode|key|hash|uuid|no)$|Id$|ID$", re.IGNORECASE)
_FEW_VALUES = 50
"""Integers with at most so many values are looked up in a table."""
_BOTH_VALUES = 1000
"""Integers with at most so many values are numbers and looked up too."""
_ROWS_OF_A_SHORT_RUN = 200_000
"""How many rows small files are passed over for, all epochs together."""
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*")
_COLUMN = 34
"""Where the comments stand, if a line is not longer."""


def draft(path: str, model: str | None = None, label: str | None = None) -> str:
    """Returns a configuration as YAML for files of rows.

    Args:
        path: a file, a glob or a folder of csv, tsv, jsonl or parquet.
        model: "ranking" or "retrieval"; None for ranking if a column looks like a label, and retrieval if none does.
        label: the column that ranking predicts; None to guess it.

    Raises:
        UserError: the files cannot be read, or have no columns that the model could use.
    """
    found = survey(path)
    guessed = None if model == "retrieval" else _label_of(found.columns, label)
    if model is None:
        model = "retrieval" if guessed is None and _sides_of(found.columns) is not None else "ranking"
    lines = _ranking(path, found, guessed) if model == "ranking" else _retrieval(path, found)
    return "\n".join(lines) + "\n"


def _ranking(path: str, found: Survey, label: Column | None) -> Iterator[str]:
    if label is None:
        names = ", ".join(f"{column.name} ({column.num_values:,} values)" for column in found.columns)
        raise UserError(
            f"{path}: no column has two values, as a label has; its columns are {names}. Add a column of 0 and 1, or "
            "draft a configuration of retrieval: embedtrain init retrieval --from FILE"
        )
    features = [column for column in found.columns if column is not label]
    dense = [column for column in features if column.kind in ("integer", "number")]
    dense = [column for column in dense if not _is_id(column) and column.num_values > 2]
    looked_up = [column for column in features if _is_looked_up(column, found.num_rows)]
    dense = [column for column in dense if column not in looked_up or column.num_values > _FEW_VALUES]
    left_out = [column for column in features if column not in dense and column not in looked_up]
    if not looked_up:
        raise UserError(
            f"{path}: no column looks like one to look up in a table; columns of numbers alone need no tables"
        )
    yield from _head("ranking", path, found)
    yield "data:"
    yield f"  path: {_scalar(path)}"
    yield _commented("  valid_path: null", "held-out examples of the same columns, measured after each epoch")
    yield from _layout(found)
    yield _commented(f"  label: {_scalar(label.name)}", f"guessed: it has two values, {_shares(label)}")
    values = [value for value, _ in label.counts]
    if set(values) <= {"0", "1"}:
        yield _commented("  positive: null", "labels are 0 and 1")
    else:
        yield _commented(f"  positive: {_scalar(_positive(label), quoted=True)}", "guessed: the value that counts as 1")
    yield "  dense:" if dense else "  dense: []"
    yield from (_commented(f"  - {_scalar(column.name)}", _of_numbers(column)) for column in dense)
    yield "  categorical:"
    for column in looked_up:
        both = "; a number above too" if column in dense else ""
        yield _commented(f"  - {_scalar(column.name)}", f"{_of_values(column, found)}{both}")
    bags = [column for column in looked_up if column.kind == "list" or column.separator is not None]
    if bags:
        yield "  features:"
        for column in bags:
            separator = "" if column.separator is None else f', separator: "{column.separator}"'
            yield f"    {_scalar(column.name)}: {{bag: true{separator}, pooling: mean}}"
    for column in left_out:
        yield f"  # left out: {_in_comment(column.name)}, {_why_left_out(column, found)}"
    is_small = found.is_all
    yield ""
    yield "table:"
    yield f"  dim: {8 if is_small else 16}"
    yield ""
    yield "train:"
    epochs = min(30, max(3, _ROWS_OF_A_SHORT_RUN // found.num_rows)) if is_small else 1
    yield _commented(f"  epochs: {epochs}", "passes over the data; more can follow in the same run")
    yield _commented(f"  global_batch_size: {256 if is_small else 4096}", "examples of a step, over all ranks")


def _retrieval(path: str, found: Survey) -> Iterator[str]:
    sides = _sides_of(found.columns)
    if sides is None:
        names = ", ".join(column.name for column in found.columns)
        raise UserError(f"{path}: expected a column of users and one of items, got the columns {names}")
    user, item = sides
    yield from _head("retrieval", path, found)
    yield "data:"
    yield f"  path: {_scalar(path)}"
    yield from _layout(found)
    yield _commented(f"  user_column: {_scalar(user.name)}", f"guessed: {_of_values(user, found)}")
    yield _commented(f"  item_column: {_scalar(item.name)}", f"guessed: {_of_values(item, found)}")
    for column in found.columns:
        if column not in sides:
            yield f"  # not used: {_in_comment(column.name)}, {_of_values(column, found)}"
    yield ""
    yield "evaluate:"
    yield _commented("  path: null", "held-out interactions of the same columns")
    yield ""
    yield "table:"
    yield f"  dim: {32 if found.is_all else 64}"
    yield ""
    yield "train:"
    yield _commented("  epochs: 20", "passes over the data")
    yield _commented(f"  global_batch_size: {64 if user.num_values < 5000 else 512}", "users of a step, over all ranks")


def _head(model: str, path: str, found: Survey) -> Iterator[str]:
    seen = f"all {found.num_rows:,} rows" if found.is_all else f"the first {found.num_rows:,} rows"
    yield f"# Drafted by `embedtrain init` from {seen} of {_in_comment(path)}: read what was guessed, and correct it."
    yield "# docs/settings.md and `embedtrain config show FILE` have all settings."
    yield ""
    yield f"model: {model}"
    yield ""


def _layout(found: Survey) -> Iterator[str]:
    yield f"  format: {found.format}"
    if found.layout.delimiter is not None:
        yield f"  delimiter: {_scalar(found.layout.delimiter, quoted=True)}"
    if not found.has_names:
        names = ", ".join(found.layout.columns or ())
        yield "  # The first line holds values, not names of columns: give them better ones here."
        yield f"  columns: [{names}]"


def _label_of(columns: Sequence[Column], name: str | None) -> Column | None:
    """Returns the column to predict: a column of two values, by its name, or else the last of them."""
    if name is not None:
        for column in columns:
            if column.name == name:
                if column.num_values != 2:
                    raise UserError(f"--label {name}: expected a column of two values, got {column.num_values:,}")
                return column
        raise UserError(f"--label {name}: there is no such column; there are {', '.join(c.name for c in columns)}")
    binary = [column for column in columns if column.num_values == 2 and column.kind != "list"]
    by_name = {column.name.lower(): column for column in binary}
    named = [by_name[each] for each in _LABELS if each in by_name]
    zero_one = [column for column in binary if {value for value, _ in column.counts} == {"0", "1"}]
    return next(iter([*named, *zero_one[-1:], *binary[-1:]]), None)


def _sides_of(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Returns the columns of users and of items: by their names, or else the first two that look like ids."""
    ids = [column for column in columns if column.kind in ("integer", "text")]

    def named(words: Sequence[str]) -> Column | None:
        return next((column for word in words for column in ids if word in column.name.lower()), None)

    user, item = named(_USERS), named(_ITEMS)
    rest = [column for column in ids if column not in (user, item)]
    rest.sort(key=lambda column: not _is_id(column))
    user = user or (rest.pop(0) if rest else None)
    item = item or (rest.pop(0) if rest else None)
    return None if user is None or item is None else (user, item)


def _is_id(column: Column) -> bool:
    return column.kind == "integer" and _IDS.search(column.name) is not None


def _is_looked_up(column: Column, num_rows: int) -> bool:
    """Returns whether a column's values are looked up: they come again, and there is more than one."""
    if column.num_values < 2 or column.kind == "number":
        return False
    if column.kind != "list" and column.num_values >= num_rows - column.num_missing > 2:
        return False
    return column.kind != "integer" or _is_id(column) or column.num_values <= _BOTH_VALUES


def _why_left_out(column: Column, found: Survey) -> str:
    if column.num_values == 0:
        return "which has no value"
    if column.num_values == 1:
        return "which is the same in every row"
    return f"of which nearly every row has another value, such as {_in_comment(column.counts[0][0])}"


def _positive(label: Column) -> str:
    """Returns the value that means yes, or else the rarer one."""
    values = [value for value, _ in label.counts]
    meant = [value for value in values if value.strip().lower() in _POSITIVES]
    return meant[0] if len(meant) == 1 else values[-1]


def _shares(column: Column) -> str:
    total = sum(count for _, count in column.counts)
    return " and ".join(f"{_in_comment(value)} ({count / total:.1%})" for value, count in column.counts)


def _of_numbers(column: Column) -> str:
    missing = f", {column.num_missing:,} missing" if column.num_missing else ""
    return f"numbers from {column.least:g} to {column.greatest:g}{missing}"


def _of_values(column: Column, found: Survey) -> str:
    example = f", such as {_in_comment(column.counts[0][0])}" if column.counts else ""
    missing = f", {column.num_missing:,} missing" if column.num_missing else ""
    where = "" if found.is_all else f" in {found.num_rows:,} rows"
    return f"{column.num_values:,} values{where}{example}{missing}"


def _commented(line: str, comment: str) -> str:
    return f"{line:<{_COLUMN}} # {comment}"


def _in_comment(text: str) -> str:
    """Returns a text as it can stand on one line of a comment."""
    shown = text if text.isprintable() and text else json.dumps(text)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def _scalar(text: str, *, quoted: bool = False) -> str:
    """Returns a text as YAML."""
    if not quoted and _PLAIN.fullmatch(text) and text != "null":
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())
