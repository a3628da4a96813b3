"""Finding quoted fields in delimited text, by the rules of pandas and Arrow.

A quote opens a field only as its first character. Two quotes within a quoted field stand for one. Any other quote is
an ordinary character.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_LINE_FEED, _RETURN = 10, 13


class Quoting(NamedTuple):
    """Holds the delimiter and the quote of a delimited text, both ASCII."""

    delimiter: str
    quote: str


class Spans(NamedTuple):
    """Holds the quoted parts of a text: part `i` is between the quotes at `opens[i]` and `closes[i]`.

    Attributes:
        opens: [n] int64.
        closes: [n] int64, or [n - 1] if the text ends within quotes.
    """

    opens: NDArray[np.int64]
    closes: NDArray[np.int64]

    @property
    def open_at(self) -> int | None:
        """Position of the quote that is still open at the end; None if there is none."""
        return int(self.opens[-1]) if len(self.opens) > len(self.closes) else None

    def are_inside(self, places: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Returns [n] bool: which of [n] ascending positions are within quotes."""
        inside: NDArray[np.bool_] = np.searchsorted(self.opens, places) > np.searchsorted(self.closes, places)
        return inside


def find_spans(text: bytes, quoting: Quoting) -> Spans:
    """Finds the quoted parts of a text that begins outside quotes."""
    quote = ord(quoting.quote)
    codes = np.frombuffer(text, np.uint8)
    at = np.flatnonzero(codes == quote).astype(np.int64)
    if len(at) == 0:
        return Spans(at, at)
    # The common case, without a loop: quotes come in pairs, around a whole field or within one.
    ends_field = np.zeros(256, np.bool_)
    ends_field[[ord(quoting.delimiter), _LINE_FEED, _RETURN, quote]] = True
    opens, closes = at[::2], at[1::2]
    before, after = opens[opens > 0] - 1, closes[closes < len(text) - 1] + 1
    if ends_field[codes[before]].all() and ends_field[codes[after]].all():
        return Spans(opens, closes)
    return _walk_quotes(text, at.tolist(), bytes([ord(quoting.delimiter), _LINE_FEED, _RETURN]))


def open_test(quoting: Quoting) -> Callable[[bytes, bool], bool]:
    """Returns a function that maps a line and whether it begins within quotes to whether it ends within quotes.

    For short texts the function is faster than `find_spans`.
    """
    opening = quoting.quote.encode()
    delimiter, quote = re.escape(quoting.delimiter.encode()), re.escape(quoting.quote.encode())
    field = b"(?:^|(?<=[%b\r\n]))%b[^%b]*(?:%b%b[^%b]*)*(?:(%b)|\\Z)" % (delimiter, *[quote] * 6)
    find_closing = re.compile(field).findall
    return lambda line, is_open: b"" in find_closing(opening + line if is_open else line)


def find_line_ends(text: bytes) -> NDArray[np.int64]:
    """Returns the position after each line end: LF, CRLF or a bare CR, also as the last byte."""
    codes = np.frombuffer(text, np.uint8)
    is_end = codes == _LINE_FEED
    if b"\r" in text:
        is_return = codes == _RETURN
        is_return[:-1] &= ~is_end[1:]
        is_end = is_end | is_return
    return np.flatnonzero(is_end).astype(np.int64) + 1


def _walk_quotes(text: bytes, places: list[int], field_ends: bytes) -> Spans:
    """Finds the quoted parts one quote at a time."""
    opens: list[int] = []
    closes: list[int] = []
    number = 0
    while number < len(places):
        place = places[number]
        if len(opens) == len(closes):
            if place == 0 or text[place - 1] in field_ends:
                opens.append(place)
        elif number + 1 < len(places) and places[number + 1] == place + 1:
            number += 1
        else:
            closes.append(place)
        number += 1
    return Spans(np.array(opens, np.int64), np.array(closes, np.int64))
