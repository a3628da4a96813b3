"""Scores go to Parquet, CSV and JSON lines, beside kept columns of any type."""

from __future__ import annotations

import csv
import decimal
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedtrain.errors import UserError
from embedtrain.serve import writing
from embedtrain.serve.scoring import Scored
from embedtrain.serve.writing import write_lines, write_scores


def scored(**kept: pa.Array) -> Scored:
    scores = np.linspace(0.25, 0.5, len(next(iter(kept.values()))), dtype=np.float32)
    return Scored(scores, scores, scores, pa.RecordBatch.from_pydict(kept))


def test_every_format_holds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_ROWS_PER_GROUP", 3)
    names = ["plain", 'a "quote"', "a,b\nc", ""]
    parts = [scored(name=pa.array(names[:2])), scored(name=pa.array(names[2:])), scored(name=pa.array(["last"]))]
    for suffix in ("parquet", "csv", "jsonl"):
        assert write_scores(parts, str(tmp_path / f"x.{suffix}")) == 5
    expected = [*zip([*names, "last"], [0.25, 0.5, 0.25, 0.5, 0.25], strict=True)]
    table = pq.read_table(tmp_path / "x.parquet")
    assert [*zip(table["name"].to_pylist(), table["probability"].to_pylist(), strict=True)] == expected
    assert pq.ParquetFile(tmp_path / "x.parquet").metadata.num_row_groups == 2
    with open(tmp_path / "x.csv", newline="") as file:
        assert [(row["name"], float(row["probability"])) for row in csv.DictReader(file)] == expected
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [(row["name"], row["probability"]) for row in rows] == expected


def test_lines_are_numbers_alone_if_nothing_is_kept() -> None:
    file = io.BytesIO()
    part = Scored(np.array([0.5, 1.0], np.float32), *[np.zeros(2, np.float32)] * 2, pa.RecordBatch.from_pydict({}))
    write_lines([part], file, as_json=False)
    assert file.getvalue() == b"0.5\n1\n"


def test_no_rows_make_a_file_without_rows(tmp_path: Path) -> None:
    assert write_scores([], str(tmp_path / "x.parquet")) == 0
    assert pq.read_table(tmp_path / "x.parquet").schema.names == ["probability"]


@pytest.mark.parametrize("column", [pa.array([[1]]), pa.array([decimal.Decimal("1.5")])])
def test_csv_refuses_what_it_cannot_hold(column: pa.Array, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"CSV cannot hold the nested or decimal values of odd: write \.parquet or \.jsonl"
    ):
        write_scores([scored(odd=column)], str(tmp_path / "x.csv"))
    assert list(tmp_path.iterdir()) == []
    write_scores([scored(odd=column)], str(tmp_path / "x.jsonl"))


def test_a_kept_column_of_another_type_is_named(tmp_path: Path) -> None:
    parts = [scored(id=pa.array([1])), scored(id=pa.array(["x"]))]
    with pytest.raises(UserError, match="a kept column has different types"):
        write_scores(parts, str(tmp_path / "x.parquet"))
