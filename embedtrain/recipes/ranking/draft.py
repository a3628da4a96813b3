"""Drafting a configuration of ranking for files of rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from embedtrain.data.survey import Column, Survey
from embedtrain.errors import UserError
from embedtrain.recipes.draft import commented, head, in_comment, is_id, layout, of_numbers, of_values, scalar

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
_FEW_VALUES = 50
"""Columns of integers with more distinct values are dense, also if they are categorical."""
_BOTH_VALUES = 1000
"""Columns of integers with more distinct values are not categorical, unless their names look like ids."""
_SHOWN_VALUES = 5
_ROWS_OF_A_SHORT_RUN = 200_000
"""Number of rows to train on over all epochs, for small files."""


def draft(path: str, found: Survey, label: str | None) -> Iterator[str]:
    """Yields the lines of a configuration; see `Recipe.draft`."""
    return _ranking(path, found, _label_of(found.columns, label))


def _ranking(path: str, found: Survey, label: Column | None) -> Iterator[str]:
    if label is None:
        raise UserError(f"{path}: {_why_no_label(found.columns)}")
    features = [column for column in found.columns if column is not label]
    dense = [column for column in features if column.kind in ("integer", "number")]
    dense = [column for column in dense if not is_id(column) and column.num_values > 2]
    looked_up = [column for column in features if _is_looked_up(column, found.num_rows) and "/" not in column.name]
    dense = [column for column in dense if column not in looked_up or column.num_values > _FEW_VALUES]
    left_out = [column for column in features if column not in dense and column not in looked_up]
    if not looked_up:
        why = "".join(f"; {column.name}, {_why_left_out(column, found)}" for column in left_out)
        raise UserError(f"{path}: no column looks categorical; a model of numbers alone needs no tables{why}")
    yield from head("ranking", path, found)
    yield "data:"
    yield f"  path: {scalar(path)}"
    yield commented("  valid_path: null", "held-out examples of the same columns, measured after each epoch")
    yield from layout(found)
    yield commented(f"  label: {scalar(label.name)}", f"guessed: it has two values, {_shares(label)}{_missing(label)}")
    values = [value for value, _ in label.counts]
    if set(values) <= {"0", "1"}:
        yield commented("  positive: null", "labels are 0 and 1")
    else:
        yield commented(f"  positive: {scalar(_positive(label), quoted=True)}", "guessed: the value that counts as 1")
    if num_bad := found.num_bad + label.num_missing:
        why = "a run refuses lines that cannot be read or have no label"
        yield commented("  max_bad_lines: 0", f"{why}; {num_bad} leaves them out")
    yield "  dense:" if dense else "  dense: []"
    yield from (commented(f"  - {scalar(column.name)}", of_numbers(column)) for column in dense)
    yield "  categorical:"
    for column in looked_up:
        both = "; also dense" if column in dense else ""
        yield commented(f"  - {scalar(column.name)}", f"{of_values(column, found)}{both}")
    bags = [column for column in looked_up if column.is_bag]
    if bags:
        yield "  features:"
        for column in bags:
            separator = "" if column.separator is None else f', separator: "{column.separator}"'
            yield f"    {scalar(column.name)}: {{bag: true{separator}, pooling: mean}}"
    for column in left_out:
        yield f"  # left out: {in_comment(column.name)}, {_why_left_out(column, found)}"
    is_small = found.is_all
    yield ""
    yield "table:"
    yield f"  dim: {8 if is_small else 16}"
    yield ""
    yield "train:"
    epochs = min(30, max(3, _ROWS_OF_A_SHORT_RUN // found.num_rows)) if is_small else 1
    yield commented(f"  epochs: {epochs}", "passes over the data; more can follow in the same run")
    yield commented(f"  global_batch_size: {256 if is_small else 4096}", "examples per step, over all ranks")


def _label_of(columns: Sequence[Column], name: str | None) -> Column | None:
    """Returns the column to predict: a column of two values, chosen by its name, or the last one."""
    if name is not None:
        for column in columns:
            if column.name == name:
                if column.num_values != 2 or column.is_bag:
                    got = "one of bags" if column.is_bag else f"{column.num_values:,}"
                    raise UserError(f"--label {name} must name a column of two values, got {got}")
                return column
        raise UserError(f"--label {name}: there is no such column; there are {', '.join(c.name for c in columns)}")
    binary = [column for column in columns if column.num_values == 2 and not column.is_bag]
    by_name = {column.name.lower(): column for column in binary}
    named = [by_name[each] for each in _LABELS if each in by_name]
    zero_one = [column for column in binary if {value for value, _ in column.counts} == {"0", "1"}]
    return next(iter([*named, *zero_one[-1:], *binary[-1:]]), None)


def _why_no_label(columns: Sequence[Column]) -> str:
    named = [column for column in columns if column.name.lower() in _LABELS]
    if not named:
        listed = ", ".join(f"{column.name} ({column.num_values:,} values)" for column in columns)
        return f"no column has two values, as a label has; its columns are {listed}"
    said = []
    for column in named:
        shown = ", ".join(in_comment(value) for value, _ in column.counts[:_SHOWN_VALUES])
        rest = ", ..." if column.num_values > _SHOWN_VALUES else ""
        number = "1 value" if column.num_values == 1 else f"{column.num_values:,} values"
        said.append(f"{column.name} has {number}: {shown}{rest}" if shown else f"{column.name} has no value")
    return f"no column has two values, as a label has; {'; '.join(said)}"


def _is_looked_up(column: Column, num_rows: int) -> bool:
    """Returns whether to look a column up: it has more than one distinct value, and values repeat."""
    if column.num_values < 2 or column.kind == "number":
        return False
    if not column.is_bag and column.num_values >= num_rows - column.num_missing > 2:
        return False
    return column.kind != "integer" or is_id(column) or column.num_values <= _BOTH_VALUES


def _why_left_out(column: Column, found: Survey) -> str:
    if _is_looked_up(column, found.num_rows):
        return "whose name holds '/', which names of tables must not: rename it to use it"
    if column.num_values == 0:
        return "which has no value"
    if column.num_values == 1:
        return "which has the same value in every row"
    return f"whose values are nearly all distinct: {of_values(column, found)}"


def _positive(label: Column) -> str:
    """Returns the value that means yes, or the rarer value."""
    values = [value for value, _ in label.counts]
    meant = [value for value in values if value.strip().lower() in _POSITIVES]
    return meant[0] if len(meant) == 1 else values[-1]


def _missing(label: Column) -> str:
    return (
        f"; {label.num_missing:,} {'row has' if label.num_missing == 1 else 'rows have'} none"
        if label.num_missing
        else ""
    )


def _shares(column: Column) -> str:
    total = sum(count for _, count in column.counts)
    return " and ".join(f"{in_comment(value)} ({count / total:.1%})" for value, count in column.counts)
