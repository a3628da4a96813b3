"""Facts read from files are checked against a declaration, an annotated dataclass, before anything uses them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

from embedtrain.errors import UserError, printable

T = TypeVar("T")

LARGEST = 2**63 - 1
"""The largest number that an int64 holds."""

Count = Annotated[int, Field(strict=True, ge=0, le=LARGEST)]
Positive = Annotated[int, Field(strict=True, ge=1, le=LARGEST)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]

_FOUND_LETTERS = 60
_FAULTS_SHOWN = 3

declared = with_config(ConfigDict(arbitrary_types_allowed=True))
"""Decorates a dataclass that has fields of types that only its own checks understand."""


class SchemaError(UserError):
    """A value is not what its declaration allows; the message names the key, what it holds and what it may hold."""


def parse(kind: type[T], value: Any) -> T:
    """Returns a dataclass made of what was read from JSON; keys that it does not declare are left out.

    Raises:
        SchemaError: a key is missing, or holds something of another type or range.
    """
    try:
        parsed: T = _adapter(kind).validate_python(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        more = f" (and {len(faults) - _FAULTS_SHOWN:,} more)" if len(faults) > _FAULTS_SHOWN else ""
        raise SchemaError("; ".join(_told(each) for each in faults[:_FAULTS_SHOWN]) + more) from None
    return parsed


_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)


def _told(fault: Any) -> str:
    """Says a fault as: where, what was expected, what is there."""
    where = ""
    for step in fault["loc"]:
        if isinstance(step, int):
            where += f"[{step}]"
        elif step.isidentifier():
            where += f".{step}"
        else:
            where += f"[{step!r}]"
    where = where.removeprefix(".") or "it"
    if fault["type"] == "missing":
        return f"{where} is missing"
    expected = fault["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    found = repr(fault["input"])
    if len(found) > _FOUND_LETTERS:
        found = f"{found[:_FOUND_LETTERS]}..."
    return printable(f"{where}: expected {expected[:1].lower()}{expected[1:]}, found {found}")
