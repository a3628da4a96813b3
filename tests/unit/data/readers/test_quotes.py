"""Quoted parts are found where Python's own parser of CSV finds them, whatever the text."""

from __future__ import annotations

import csv
import io

import numpy as np
import pyarrow.csv as pa_csv
from hypothesis import given
from hypothesis import strategies as st

from embedtrain.data.readers.quotes import Quoting, find_line_ends, find_spans

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
    assert is_open == (after[-1] != ["q", "r", "s", "t"])


def test_line_ends() -> None:
    assert find_line_ends(b"a\nb\r\nc\rd").tolist() == [2, 5, 7]
    assert find_line_ends(b"a\r").tolist() == [2]
    assert find_line_ends(b"").tolist() == []


def test_spans() -> None:
    spans = find_spans(b'a,"b\n""c""",5" x\n"d', COMMAS)
    assert spans.open_at == 17
    assert spans.are_inside(np.array([4, 15, 18])).tolist() == [True, False, True]
