"""The head of data, in each of their forms."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from embedtrain.data.head import write_head


def heads(path: object, folder: Path, max_bytes: int, format: str = "auto") -> list[Path]:
    folder.mkdir(exist_ok=True)
    found = write_head(path, format, str(folder), max_bytes)
    assert found is not None
    return [Path(each) for each in found]


def test_small_data_are_their_own_head(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert write_head(str(tmp_path), "text", str(tmp_path), 8) is None


def test_a_text_keeps_whole_lines_and_its_first_one(tmp_path: Path) -> None:
    lines = ["user,item", *(f"{number},{number}" for number in range(1000))]
    (tmp_path / "train.csv").write_text("\n".join(lines))
    (head,) = heads(f"{tmp_path}/train.csv", tmp_path / "head", 300)
    kept = head.read_text().splitlines()
    assert head.name == "00000-train.csv"
    assert kept == lines[: len(kept)]
    assert 200 < head.stat().st_size <= 600


def test_several_files_are_cut_together_and_unpacked(tmp_path: Path) -> None:
    for name in ("a.txt.gz", "b.txt.gz", "c.txt.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"some words\n" * 100))
    found = heads([f"{tmp_path}/{name}.txt.gz" for name in "abc"], tmp_path / "head", 1500)
    assert [head.name for head in found] == ["00000-a.txt", "00001-b.txt"]
    assert found[0].read_bytes() == b"some words\n" * 100
    assert 300 < found[1].stat().st_size < 1100


def test_parquet_keeps_columns_and_the_first_rows(tmp_path: Path) -> None:
    table = pa.table({"user": list(range(200_000)), "items": [["a", "b"]] * 200_000})
    pq.write_table(table, tmp_path / "x.parquet")
    (head,) = heads(f"{tmp_path}/x.parquet", tmp_path / "head", 10_000)
    kept = pq.read_table(head)
    assert kept.schema.names == table.schema.names
    assert 0 < len(kept) < len(table)
    assert kept == table.slice(0, len(kept))
