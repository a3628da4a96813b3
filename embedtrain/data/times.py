"""Columns of numbers and of times, whatever a file has them in: numbers, texts of numbers, dates, ISO 8601 texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedtrain.errors import UserError

_DATE = pa.timestamp("us")
_DATES = (_DATE, pa.timestamp("us", tz="UTC"), pa.timestamp("ns"), pa.timestamp("ns", tz="UTC"))
_SHOWN_LETTERS = 40


@dataclass(frozen=True)
class Times:
    """When events happened.

    Attributes:
        values: [n] int64 or float64; numbers as the files have them, or microseconds since 1970 of dates.
        are_dates: whether the files hold dates.
        have_zone: whether the dates have a time zone; dates without one count as UTC.
    """

    values: NDArray[np.int64] | NDArray[np.float64]
    are_dates: bool
    have_zone: bool = False

    @property
    def noun(self) -> str:
        """What the files hold, in words."""
        if not self.are_dates:
            return "numbers"
        return "dates with a time zone" if self.have_zone else "dates without a time zone"

    def texts(self) -> pa.Array:
        """Returns the times as texts [n] that `parse_times` reads again."""
        found = pa.array(self.values)
        return (found.cast(_DATE) if self.are_dates else found).cast(pa.large_string())

    def where(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Times:
        """Returns the times of some events."""
        return Times(self.values[kept], self.are_dates, self.have_zone)


def joined(parts: Sequence[Times]) -> Times:
    """Returns the times of several blocks one after the other; all are dates, or none."""
    return Times(np.concatenate([part.values for part in parts]), parts[0].are_dates, parts[0].have_zone)


def parse_times(column: pa.Array, name: str, place: Callable[[int], str]) -> Times:
    """Returns what a column of times holds.

    Args:
        column: [n], numbers, dates, or texts of either.
        name: of the column.
        place: names the file and the line of a row.

    Raises:
        UserError: a row holds no time, or no finite number.
    """
    _refuse_missing(column, name, "time", place)
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _dates(column)
    if not pa.types.is_large_string(kind):
        return Times(_numbers(column, name, place), are_dates=False)
    found = _parsed(column)
    if found is None:
        wrong = _first_unlike(column)
        raise UserError(
            f"{place(wrong)}: column {name!r} holds {_shown(column, wrong)}: expected a number, or a date such as "
            "2024-05-31 or 2024-05-31T12:00:00, with a time zone in all rows or in none"
        )
    _refuse_infinite(found.values, column, name, place)
    return found


def parse_numbers(column: pa.Array, name: str, place: Callable[[int], str]) -> NDArray[np.float64]:
    """Returns the numbers [n] of a column.

    Raises:
        UserError: a row holds no finite number.
    """
    _refuse_missing(column, name, "number", place)
    if pa.types.is_large_string(column.type):
        try:
            column = _trimmed(column).cast(pa.float64())
        except pa.ArrowInvalid:
            wrong = next(row for row in range(len(column)) if not _is_number(column.slice(row, 1)))
            raise UserError(
                f"{place(wrong)}: column {name!r} holds {_shown(column, wrong)}: expected a number"
            ) from None
    return _numbers(column, name, place).astype(np.float64)


def _parsed(column: pa.Array) -> Times | None:
    """Returns the times of texts; None if they are not all numbers, or all dates."""
    column = _trimmed(column)
    for kind in (pa.int64(), pa.float64()):
        with suppress(pa.ArrowInvalid):
            return Times(np.asarray(column.cast(kind)), are_dates=False)
    for kind in _DATES:
        with suppress(pa.ArrowInvalid):
            return _dates(column.cast(kind))
    return None


def _first_unlike(column: pa.Array) -> int:
    """Returns the first row of texts that holds no time, or another kind of time than the rows before it."""
    first = None
    for row in range(len(column)):
        found = _parsed(column.slice(row, 1))
        if found is None or (first is not None and found.are_dates != first.are_dates):
            return row
        first = first or found
    return len(column) - 1


def _dates(column: pa.Array) -> Times:
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms") if pa.types.is_date64(column.type) else pa.timestamp("s"))
    # Nanoseconds are cut off: a file with some of them is no mistake.
    column = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False)
    return Times(np.asarray(column.cast(pa.int64())), are_dates=True, have_zone=column.type.tz is not None)


def _numbers(column: pa.Array, name: str, place: Callable[[int], str]) -> NDArray[np.int64] | NDArray[np.float64]:
    if pa.types.is_integer(column.type):
        with suppress(pa.ArrowInvalid):  # unsigned numbers from 2^63 on
            return np.asarray(column.cast(pa.int64()))
    elif not (pa.types.is_floating(column.type) or pa.types.is_decimal(column.type)):
        raise UserError(f"{place(0)}: column {name!r} holds {column.type}: expected numbers")
    values = np.asarray(column.cast(pa.float64(), safe=False))
    _refuse_infinite(values, column, name, place)
    return values


def _refuse_missing(column: pa.Array, name: str, noun: str, place: Callable[[int], str]) -> None:
    is_missing = pc.is_null(column)
    if pa.types.is_large_string(column.type):
        is_missing = pc.equal(_trimmed(column), "").fill_null(True)
    if pc.any(is_missing).as_py():
        row = int(np.flatnonzero(np.asarray(is_missing))[0])
        raise UserError(f"{place(row)}: column {name!r} holds no {noun}")


def _refuse_infinite(values: NDArray[np.generic], column: pa.Array, name: str, place: Callable[[int], str]) -> None:
    wrong = np.flatnonzero(~np.isfinite(values.astype(np.float64)))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(f"{place(row)}: column {name!r} holds {_shown(column, row)}: expected a finite number")


def _is_number(column: pa.Array) -> bool:
    try:
        _trimmed(column).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def _trimmed(column: pa.Array) -> pa.Array:
    return pc.utf8_trim_whitespace(column)


def _shown(column: pa.Array, row: int) -> str:
    value = column[row].as_py()
    return repr(value[:_SHOWN_LETTERS]) if isinstance(value, str) else repr(value)
