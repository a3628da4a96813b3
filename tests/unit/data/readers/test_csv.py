"""CSV is read as Python's own parser reads it, whatever the text and whether or not its last line has an end."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from embedtrain.data.columns import read_columns
from embedtrain.data.readers import FORMATS, Layout
from embedtrain.data.readers.quotes import Quoting, find_spans
from embedtrain.data.readers.rows import Rows, TextFormat, Uses
from embedtrain.data.sources import expand_sources

PIECES = st.sampled_from(['"', '"', '""', ",", ",", "\n", "\n", "\r\n", "\r", "a", "b c", 'x"y', ",1\n", '"2\n",3\n'])
TEXT = st.lists(PIECES, max_size=30).map("".join)


def read(path: Path, content: str, names: list[str]) -> list[list[str]]:
    path.write_bytes(content.encode())
    batches = [rows.columns for rows in read_columns(expand_sources(str(path)), names)]
    return [list(row) for columns in batches for row in zip(*(c.to_pylist() for c in columns), strict=True)]


@given(TEXT, st.sampled_from(["", "\n", "\r\n"]))
@example('1,"a\nb"', "")
@example('"1","a"', "")
def test_rows_and_their_lines_are_those_of_python(text: str, end: str) -> None:
    text += end
    format = FORMATS["csv"]
    assert isinstance(format, TextFormat)
    assume(find_spans(text.encode(), Quoting(",", '"')).open_at is None)
    expected, expected_wrong, line = {}, {}, 0
    reader = csv.reader(io.StringIO(text, newline=""))
    for row in reader:
        if len(row) == 2:
            expected[line] = row
        elif row:
            expected_wrong[line] = f"expected 2 fields, got {len(row)}"
        line = reader.line_num
    parsed = format.parse(text.encode(), ["n", "c"], ("n", "c"), Layout(), Uses())
    rows = Rows(parsed.batch, 0, parsed.find_lines)
    found = [list(row.values()) for row in parsed.batch.to_pylist()]
    assert dict(zip(rows.lines.tolist(), found, strict=True)) == expected
    assert parsed.wrong == expected_wrong


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r"])
def test_the_last_line_need_not_end(end: str, tmp_path: Path) -> None:
    names = ["label", "n", "c"]
    assert read(tmp_path / "a.csv", f'label,n,c\n1,2,"a\nb"{end}', names) == [["1", "2", "a\nb"]]
    assert read(tmp_path / "b.csv", f'label,n,c\n\n1,2,"a"{end}', names) == [["1", "2", "a"]]
    assert read(tmp_path / "c.csv", f'"label","n","c"{end}', names) == []
