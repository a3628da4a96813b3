"""Ids are read as the text they are, whatever the file; what cannot be an id is refused by its file and column."""

from __future__ import annotations

import functools
import gzip
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedtrain.data.columns import read_columns
from embedtrain.data.readers import blocks, rows, suffixes_of
from embedtrain.data.sources import expand_sources
from embedtrain.errors import UserError

HUGE = 2**64 - 1
USERS, ITEMS = ["7", "7", str(HUGE), "-3"], ["a b", "9007199254740993", "é", "a b"]


def write_csv(path: Path, separator: str) -> None:
    rows = [f"{i}{separator}x{separator}{u}" for u, i in zip(USERS, ITEMS, strict=True)]
    path.write_text("\n".join([f"item{separator}other{separator}user", *rows]), encoding="utf-8")


def pairs(path: str, format: str = "auto", names: tuple[str, str] = ("user", "item")) -> list[tuple[str, str]]:
    found = []
    for found_rows in read_columns(expand_sources(path, suffixes_of(format)), names, format):
        users, items = found_rows.columns
        found += list(zip(users.to_pylist(), items.to_pylist(), strict=True))
    return found


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_tables_of_text(tmp_path: Path, name: str, separator: str) -> None:
    write_csv(tmp_path / name, separator)
    assert pairs(str(tmp_path / name)) == list(zip(USERS, ITEMS, strict=True))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert pairs(str(tmp_path / f"{name}.gz")) == list(zip(USERS, ITEMS, strict=True))


@pytest.mark.parametrize("type", [pa.int64(), pa.uint64(), pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_columns_of_parquet(tmp_path: Path, type: pa.DataType) -> None:
    users = ["5", str(2**63 - 1)] if type == pa.int64() else ["5", str(HUGE)]
    plain = type.value_type if pa.types.is_dictionary(type) else type
    table = pa.table({"user": pa.array(users).cast(plain).cast(type), "item": ["x", "y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert pairs(str(tmp_path / "a.parquet")) == list(zip(users, ["x", "y"], strict=True))


def test_lines_of_users_and_their_items(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("u1 a b\n\nu2\n u3  c\td \r\n" + f"{HUGE} a")
    expected = [("u1", "a"), ("u1", "b"), ("u3", "c"), ("u3", "d"), (str(HUGE), "a")]
    assert pairs(str(tmp_path / "a.txt")) == expected


def test_a_line_longer_than_a_chunk_is_one_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "read_records", functools.partial(blocks.read_records, chunk_bytes=16))
    items = [f"item{i}" for i in range(50)]
    (tmp_path / "a.txt").write_text("u " + " ".join(items) + "\nv z\n")
    assert pairs(str(tmp_path / "a.txt")) == [*(("u", item) for item in items), ("v", "z")]


def test_a_folder_on_any_file_system() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/columns/a.csv", b"user,item\n1,2\n")
    fs.pipe_file("/columns/b.txt", b"3 4 5\n")
    assert pairs("memory://columns") == [("1", "2"), ("3", "4"), ("3", "5")]
    fs.rm("/columns", recursive=True)


def message(path: Path, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        pairs(str(path), *args)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_used_is_one_clear_line(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ",")
    text = message(tmp_path / "a.csv", "auto", ("user_id", "item"))
    assert "there is no column 'user_id'; its columns are 'item', 'other', 'user'" in text
    pq.write_table(pa.table({"user": [1.0], "item": ["x"]}), tmp_path / "a.parquet")
    assert "column 'user' holds double" in message(tmp_path / "a.parquet")
    assert "its columns are 'user', 'item'" in message(tmp_path / "a.parquet", "auto", ("user", "thing"))
    (tmp_path / "b.csv").write_text("user,item\n1,2\n3,4,5\n")
    assert "b.csv:3: expected 2 fields, got 3" in message(tmp_path / "b.csv")
    (tmp_path / "c.parquet").write_bytes(b"no parquet at all")
    assert "Parquet" in message(tmp_path / "c.parquet")
    (tmp_path / "a.data").write_text("1 2")
    assert "cannot tell the format" in message(tmp_path / "a.data")
    (tmp_path / "empty.csv").write_text("")
    assert "mpty" in message(tmp_path / "empty.csv")
