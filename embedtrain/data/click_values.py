"""Parsing the columns of a file into labels, numbers and categorical values; bad rows are left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.readers import Rows
from embedtrain.data.token_hash import text_bytes
from embedtrain.errors import UserError

Number = TypeVar("Number", int, float)

_MAX_ID = (1 << 63) - 1
# The spelling of numbers. Arrow alone also accepts hexadecimal integers; Python accepts `1_000` and non-ASCII digits.
_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
_HEXADECIMAL = "^[0-9a-fA-F]*$"
_HEXADECIMAL_DIGITS = b"0123456789abcdefABCDEF"
_SPACE, _FIRST_NOT_ASCII = 32, 128


@dataclass(frozen=True)
class Values:
    """Holds the values of a categorical column.

    Attributes:
        values: [num_values] texts, or int64 ids if the column's encoding is "id".
        lengths: [num_examples] int64; number of values per example; None for one value each.
    """

    values: pa.Array
    lengths: NDArray[np.int64] | None = None

    def of_rows(self, is_kept: NDArray[np.bool_]) -> Values:
        """Returns the values of some of the examples."""
        if self.lengths is None:
            return Values(self.values.filter(pa.array(is_kept)))
        is_kept_value = np.repeat(is_kept, self.lengths)
        return Values(self.values.filter(pa.array(is_kept_value)), self.lengths[is_kept])


@dataclass(frozen=True)
class Examples:
    """Holds parsed examples.

    Attributes:
        labels: [n] float32, 0 or 1; 0 if the schema has no label.
        dense: [n, num_dense] float32, not transformed; NaN if missing.
        categorical: values per column.
    """

    labels: NDArray[np.float32]
    dense: NDArray[np.float32]
    categorical: dict[str, Values]

    def __len__(self) -> int:
        return len(self.labels)


class _Faults:
    """Collects the faults of rows; only the first fault of a row counts."""

    def __init__(self) -> None:
        self.reasons: dict[int, str] = {}

    def add(self, row: int, reason: str) -> None:
        self.reasons.setdefault(row, reason)

    def add_where(self, is_wrong: NDArray[np.bool_], reason: Callable[[int], str]) -> None:
        for row in np.flatnonzero(is_wrong).tolist():
            self.add(row, reason(row))


def parse_rows(raw: Rows, schema: ClickSchema, where: str) -> tuple[Examples, dict[int, str]]:
    """Returns the examples of the usable rows, and the reasons for bad rows by line.

    Args:
        raw: the rows.
        schema: the meaning of their columns.
        where: the source of the rows, for messages.

    Raises:
        UserError: a column of a Parquet file has a type that does not fit the schema.
    """
    found = _Faults()
    columns = {name: raw.batch.column(name) for name in schema.used_columns}
    for name, column in columns.items():
        _require_type(name, column.type, schema, where)
    labels = _labels(columns, schema, found) if schema.label else np.zeros(raw.batch.num_rows, np.float32)
    dense = [_dense(columns[name], name, found) for name in schema.dense]
    categorical = {spec.name: _categorical(columns[spec.name], spec, schema, found) for spec in schema.categorical}
    matrix = np.stack(dense, axis=1) if dense else np.zeros((len(labels), 0), np.float32)
    if not found.reasons:
        return Examples(labels, matrix, categorical), {}
    is_kept = np.ones(len(labels), np.bool_)
    is_kept[list(found.reasons)] = False
    examples = Examples(
        labels[is_kept], matrix[is_kept], {name: values.of_rows(is_kept) for name, values in categorical.items()}
    )
    lines = raw.lines
    return examples, {int(lines[row]): found.reasons[row] for row in sorted(found.reasons)}


def _require_type(name: str, kind: pa.DataType, schema: ClickSchema, url: str) -> None:
    """Refuses columns of a Parquet file with an unusable type; columns of text files are always texts."""
    bags = {column.name for column in schema.bags}
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    value = kind.value_type if is_list else kind
    if is_list and name not in bags:
        raise UserError(f"{url}: column {name} holds lists ({kind}): declare it as a categorical bag")
    if name in bags and schema.file_format == "parquet" and not is_list:
        raise UserError(f"{url}: column {name} is declared as a bag: expected lists, got {kind}")
    is_whole = pa.types.is_integer(value) or pa.types.is_boolean(value) or _is_text(value)
    is_number = is_whole or pa.types.is_floating(value) or pa.types.is_decimal(value)
    is_counted = name in schema.dense or (name == schema.label and schema.positive is None)
    is_looked_up = name in {column.name for column in schema.categorical} or not is_counted
    # Floating-point numbers have several spellings, so they cannot serve as ids.
    if (is_counted and not is_number) or (is_looked_up and not is_whole):
        hint = "; cast it to integers or texts" if pa.types.is_floating(value) else ""
        raise UserError(f"{url}: column {name} has the type {kind}, which its use does not allow{hint}")


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _labels(columns: Mapping[str, pa.Array], schema: ClickSchema, found: _Faults) -> NDArray[np.float32]:
    assert schema.label is not None
    column = columns[schema.label]
    texts = _texts(column)
    is_missing = _is_empty(texts)
    found.add_where(is_missing, lambda _: f"column {schema.label}: the label is missing")
    if schema.positive is not None:
        return np.asarray(pc.equal(texts, schema.positive).to_numpy(zero_copy_only=False).astype(np.float32))
    numbers = _numbers(column, schema.label, found)
    found.add_where(
        (numbers != 0) & (numbers != 1) & ~is_missing,
        lambda row: f"column {schema.label}: expected a label of 0 or 1, got {texts[row].as_py()!r}",
    )
    return np.nan_to_num(numbers).astype(np.float32)


def _dense(column: pa.Array, name: str, found: _Faults) -> NDArray[np.float32]:
    return _numbers(column, name, found).astype(np.float32)


def _numbers(column: pa.Array, name: str, found: _Faults) -> NDArray[np.float64]:
    """Returns the numbers of a column, NaN if missing; a number that is not finite is a fault."""
    if _is_text(column.type):
        texts = _texts(column)
        is_missing = _is_empty(texts)
        numbers = _cast(pc.if_else(pa.array(is_missing), None, texts), pa.float64(), _to_float, name, found)
    else:
        is_missing = column.is_null().to_numpy(zero_copy_only=False)
        numbers = column.cast(pa.float64(), safe=False).fill_null(0.0).to_numpy(zero_copy_only=False)
    numbers = np.array(numbers)
    # A large float64 becomes infinite in float32.
    is_finite = np.abs(numbers) <= np.finfo(np.float32).max
    found.add_where(~is_finite, lambda row: f"column {name}: {numbers[row]} is not a finite number")
    numbers[is_missing | ~is_finite] = np.nan
    return numbers


def _categorical(column: pa.Array, spec: CategoricalColumn, schema: ClickSchema, found: _Faults) -> Values:
    if not spec.is_bag:
        if schema.file_format == "criteo":
            texts = _texts(column)
            # Checking all bytes of the column at once is faster than checking each text.
            if text_bytes(texts)[2].tobytes().translate(None, delete=_HEXADECIMAL_DIGITS):
                is_token = pc.match_substring_regex(texts, _HEXADECIMAL).to_numpy(zero_copy_only=False)
                found.add_where(
                    ~is_token, lambda row: f"column {spec.name}: {column[row].as_py()!r} is not hexadecimal"
                )
        return Values(_ids(column, spec, found) if spec.encoding == "id" else _texts(column))
    if _is_text(column.type):
        texts = _texts(column)
        column = pc.split_pattern(pc.if_else(pc.equal(texts, ""), None, texts), spec.separator)
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    values = pc.list_flatten(column)
    if spec.encoding != "id":
        return Values(_texts(values), lengths)
    in_values = _Faults()
    ids = _ids(values, spec, in_values)
    rows = np.repeat(np.arange(len(lengths)), lengths)
    for value, reason in in_values.reasons.items():
        found.add(int(rows[value]), reason)
    return Values(ids, lengths)


def _ids(column: pa.Array, spec: CategoricalColumn, found: _Faults) -> pa.Array:
    """Returns the ids as int64; an id that is missing, not an integer or outside the table is a fault."""
    assert spec.num_rows is not None
    is_missing = column.is_null().to_numpy(zero_copy_only=False)
    if _is_text(column.type):
        is_missing = _is_empty(_texts(column))
    ids = _cast(pc.if_else(pa.array(is_missing), None, column), pa.int64(), _to_id, spec.name, found)
    largest = spec.num_rows - 1
    found.add_where(is_missing, lambda _: f"column {spec.name}: the id is missing")
    found.add_where(
        (ids < 0) | (ids > largest), lambda row: f"column {spec.name}: id {ids[row]} is outside 0 to {largest}"
    )
    return pa.array(ids)


def _cast(
    column: pa.Array, kind: pa.DataType, convert: Callable[[str], Number], name: str, found: _Faults
) -> NDArray[np.float64]:
    """Casts a column, with 0 for missing values; if that fails, tests each value to find the wrong ones."""
    try:
        _refuse_hexadecimal(column, kind)
        return np.asarray(column.cast(kind).fill_null(0))
    except pa.ArrowInvalid:
        pass
    converted = np.zeros(len(column), kind.to_pandas_dtype())
    for row, value in enumerate(column.to_pylist()):
        try:
            converted[row] = 0 if value is None else convert(str(value))
        except ValueError as error:
            found.add(row, f"column {name}: {error}")
    return converted


def _refuse_hexadecimal(column: pa.Array, kind: pa.DataType) -> None:
    """Raises ArrowInvalid if a column that is cast to integers has texts such as 0x1F."""
    if pa.types.is_integer(kind) and _is_text(column.type) and pc.any(pc.match_substring_regex(column, "[xX]")).as_py():
        raise pa.ArrowInvalid("hexadecimal")


def _to_float(text: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"could not convert string to float: {text!r}")
    return float(text)


def _to_id(text: str) -> int:
    if not _INTEGER.fullmatch(text.strip()):
        raise ValueError(f"{text!r} is not an integer")
    number = int(text)
    if abs(number) > _MAX_ID:
        raise ValueError(f"id {number} is past 2^63 - 1, the largest there can be")
    return number


def _texts(column: pa.Array) -> pa.Array:
    """Returns a column as texts without surrounding spaces; empty if a value is missing."""
    texts = column.cast(pa.large_string()).fill_null("")
    if not _is_text(column.type):
        return texts
    _, _, data = text_bytes(texts)
    has_space = len(data) and (data.min() <= _SPACE or data.max() >= _FIRST_NOT_ASCII)
    return pc.utf8_trim_whitespace(texts) if has_space else texts


def _is_empty(texts: pa.Array) -> NDArray[np.bool_]:
    is_empty: NDArray[np.bool_] = text_bytes(texts)[1] == 0
    return is_empty
