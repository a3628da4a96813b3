from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedtrain.data.token_hash import hashed_rows

MASK = (1 << 64) - 1


def mixed(value: int) -> int:
    """The output function of splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def row_by_hand(text: str, num_rows: int) -> int:
    """The definition, text by text."""
    data = text.encode()
    hashed = mixed(len(data))
    for start in range(0, len(data), 8):
        hashed = mixed(hashed ^ int.from_bytes(data[start : start + 8], "little"))
    return hashed % num_rows


TEXTS = st.lists(st.none() | st.text(max_size=20) | st.text("0123456789abcdef", min_size=8, max_size=8), max_size=30)


@given(TEXTS, st.integers(1, (1 << 63) - 1), st.integers(0, 5), st.sampled_from([pa.string(), pa.large_string()]))
def test_rows_are_those_of_the_definition(
    texts: list[str | None], num_rows: int, start: int, kind: pa.DataType
) -> None:
    rows = hashed_rows(pa.array(texts, kind)[start:], num_rows)
    assert rows.dtype == np.int64
    assert rows.tolist() == [row_by_hand(text or "", num_rows) for text in texts[start:]]


@pytest.mark.parametrize(
    ("text", "row"), [("", 4995), ("68fd1e64", 945885), ("a text of more than eight bytes", 344885), ("é", 234255)]
)
def test_rows_never_change(text: str, row: int) -> None:
    assert hashed_rows(pa.array([text]), 1_000_003).tolist() == [row]
