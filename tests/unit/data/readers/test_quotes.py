"""Quoted parts are found where Python's own parser of CSV finds them, whatever the text."""

from __future__ import annotations

import csv
import io
import unittest.mock

import numpy as np
import pyarrow.csv as pa_csv
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedtrain.data.readers import blocks
from embedtrain.data.readers.quotes import Quoting, Spans, find_line_ends, find_spans, open_test
from embedtrain.data.sources import Source

COMMAS = Quoting(",", '"')
TEXT = st.lists(st.sampled_from(['"', '"', ",", "\n", "\r", "\r\n", "a", 'b"', '"",', 'x"y']), max_size=30).map("".join)


def records(text: bytes) -> list[bytes]:
    """Cuts a text at the line ends outside of quotes."""
    ends = find_line_ends(text)
    cuts = ends[~find_spans(text, COMMAS).are_inside(ends - 1)].tolist()
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [piece for piece in pieces if piece.strip(b"\r\n")]


@given(TEXT)
def test_records_are_those_that_arrow_reads(text: str) -> None:
    found = records(text.encode())
    rows = []
    table = pa_csv.read_csv(
        io.BytesIO(text.encode() or b"\n"),
        read_options=pa_csv.ReadOptions(use_threads=False, column_names=["0"]),
        parse_options=pa_csv.ParseOptions(
            newlines_in_values=True, invalid_row_handler=lambda row: rows.append(row) or "skip"
        ),
    )
    assert table.num_rows + len(rows) == len(found)


@given(TEXT)
def test_a_quote_is_open_at_the_end_if_more_text_is_swallowed(text: str) -> None:
    is_open = find_spans(text.encode(), COMMAS).open_at is not None
    after = list(csv.reader(io.StringIO(text + "\nq,r,s,t\n", newline=""), strict=False))
    assert open_test(COMMAS)(text.encode(), False) == is_open
    assert is_open == (after[-1] != ["q", "r", "s", "t"])


@given(TEXT, st.integers(1, 9))
def test_blocks_are_cut_between_records_whatever_their_size(text: str, size: int) -> None:
    data = text.encode()
    given = (data[start : start + size] for start in range(0, len(data), size))
    # A quote that is open at the end is refused, which takes a file to name the line of.
    with unittest.mock.patch.object(blocks, "_refuse_open_quote"):
        pieces = list(blocks._cut_at_records(given, 0, COMMAS, Source("a.csv", len(data), "")))
    assert b"".join(pieces) == data
    assert [record for piece in pieces for record in records(piece)] == records(data)


def test_a_long_record_is_scanned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    num_scanned = 0

    def count(text: bytes, quoting: Quoting) -> Spans:
        nonlocal num_scanned
        num_scanned += len(text)
        return find_spans(text, quoting)

    monkeypatch.setattr(blocks, "find_spans", count)
    data = [b'a,"', *[b'x ""y"",\n'] * 1000, b'"\nb,c\n']
    found = list(blocks._cut_at_records(data, 0, COMMAS, Source("a.csv", 1, "")))
    assert b"".join(found) == b"".join(data)
    assert len(found) == 1
    assert num_scanned < 2 * len(found[0])


@given(TEXT)
def test_a_line_that_begins_within_quotes_ends_as_the_whole_text_does(text: str) -> None:
    is_open = False
    data = text.encode()
    for line in data.splitlines(keepends=True):
        is_open = open_test(COMMAS)(line, is_open)
    assert is_open == (find_spans(data, COMMAS).open_at is not None)


def test_line_ends() -> None:
    assert find_line_ends(b"a\nb\r\nc\rd").tolist() == [2, 5, 7]
    assert find_line_ends(b"a\r").tolist() == [2]
    assert find_line_ends(b"").tolist() == []


def test_spans() -> None:
    spans = find_spans(b'a,"b\n""c""",5" x\n"d', COMMAS)
    assert spans.open_at == 17
    assert spans.are_inside(np.array([4, 15, 18])).tolist() == [True, False, True]
