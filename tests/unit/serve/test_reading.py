"""Rows that are to be scored: cut alike for any number of ranks, from files and from standard input."""

from __future__ import annotations

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.errors import UserError
from embedtrain.serve import reading
from embedtrain.serve.reading import RowFiles, schema_of_file

COLUMNS = (CategoricalColumn(name="shop", num_rows=5, encoding="hash"),)
CSV = ClickSchema(file_format="csv", label=None, dense=("x",), categorical=COLUMNS)
JSON = ClickSchema(file_format="jsonl", label=None, dense=("x",), categorical=COLUMNS)


def piped(*pieces: bytes) -> int:
    """Returns the end of a pipe from which some bytes can be read."""
    read, write = os.pipe()
    for piece in pieces:
        os.write(write, piece)
    os.close(write)
    return read


def units(files: RowFiles, num_ranks: int) -> list[list[list[str]]]:
    """Returns the shops of each unit of each round."""
    return [[unit.batch["shop"].to_pylist() for unit in each.units] for each in files.rounds(num_ranks)]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_files_are_cut_alike_for_any_number_of_ranks(
    num_ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "UNIT_ROWS", 2)
    for name, shops in (("a", "abcde"), ("b", "fg")):
        (tmp_path / f"{name}.csv").write_text("x,shop\n" + "".join(f"1,{shop}\n" for shop in shops))
    rounds = units(RowFiles(str(tmp_path), CSV), num_ranks)
    assert [unit for each in rounds for unit in each] == [["a", "b"], ["c", "d"], ["e"], ["f", "g"]]
    assert max(map(len, rounds)) == min(num_ranks, 3)


@pytest.mark.parametrize(
    ("schema", "lines"),
    [(CSV, ["shop,x", "a,1", '"b\nc",2']), (JSON, ['{"shop": "a", "x": 1}', '{"x": 2, "shop": "b\\nc"}'])],
)
def test_standard_input_is_read_as_a_file_is(schema: ClickSchema, lines: Sequence[str]) -> None:
    text = "\n".join(lines).encode()
    found = units(RowFiles("-", schema, standard_input=piped(text[:9], text[9:])), 1)
    assert [shop for each in found for unit in each for shop in unit] == ["a", "b\nc"]


def test_standard_input_is_not_read_past_what_has_come() -> None:
    read, write = os.pipe()
    os.write(write, b"x,shop\n1,a\n2,b")
    rounds = RowFiles("-", CSV, standard_input=read).rounds(1)
    assert next(rounds).units[0].batch["shop"].to_pylist() == ["a"]
    os.write(write, b"c\n")
    os.close(write)
    assert next(rounds).units[0].batch["shop"].to_pylist() == ["bc"]


def test_bad_lines_of_standard_input_are_counted_from_its_beginning() -> None:
    files = RowFiles("-", CSV, standard_input=piped(b"x,shop\n1,a\n2\n3,c\n"))
    assert [(each.num_bad, each.shown) for each in files.rounds(1)] == [
        (1, ["standard input:3: expected 2 fields, got 1"])
    ]
    for wrong, reason in (
        (b"1,\xff\n", "not UTF-8 text"),
        (b"1,\0\n", "a binary file"),
        (b"\xef\xbb\xbf1,a\n", "mark"),
    ):
        with pytest.raises(UserError, match=f"standard input: .*{reason}"):
            units(RowFiles("-", CSV, standard_input=piped(b"x,shop\n", wrong)), 1)


def test_a_unit_travels_without_the_rest_of_its_block(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,shop\n" + "".join(f"{row},{'s' * 50}\n" for row in range(20_000)))
    unit = next(RowFiles(str(tmp_path / "a.csv"), CSV).rounds(1)).units[0]
    sent = pickle.dumps(unit)
    assert len(sent) < 80 * len(unit.lines)
    received = pickle.loads(sent)
    assert received.batch == unit.batch and received.rows.lines.tolist() == unit.lines.tolist()


@pytest.mark.parametrize(
    ("path", "is_given", "expected"),
    [
        ("rows.csv", False, "csv"),
        ("rows.parquet", False, "parquet"),
        ("rows.jsonl.gz", False, "jsonl"),
        ("rows.tsv", False, "csv"),  # as the training would read it
        ("rows.parquet", True, "csv"),
        ("rows", False, "csv"),
        ("-", False, "csv"),
    ],
)
def test_the_name_of_a_file_tells_its_format(path: str, is_given: bool, expected: str) -> None:
    assert schema_of_file(CSV, path=path, is_given=is_given).file_format == expected


def test_parquet_cannot_come_by_standard_input() -> None:
    schema = ClickSchema(file_format="parquet", label=None, dense=("x",), categorical=COLUMNS)
    with pytest.raises(UserError, match=r"data\.format=parquet cannot be read from standard input"):
        RowFiles("-", schema)
