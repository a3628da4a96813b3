"""What only Parquet can hold: damaged pages, columns without a type, texts that are none."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedtrain.data.click_schema import CategoricalColumn, ClickSchema
from embedtrain.data.click_values import parse_rows
from embedtrain.data.columns import read_columns
from embedtrain.data.readers import FORMATS, Fault, Layout
from embedtrain.data.readers.blocks import Segment
from embedtrain.data.readers.rows import Uses
from embedtrain.data.sources import expand_sources
from embedtrain.data.vector_files import read_vectors
from embedtrain.errors import UserError


def values(path: Path, *names: str) -> list[list[object]]:
    found: list[list[object]] = [[] for _ in names]
    for rows in read_columns(expand_sources(str(path)), names, "parquet"):
        for column, held in zip(rows.columns, found, strict=True):
            held += column.to_pylist()
    return found


def not_utf8(texts: list[bytes | None]) -> pa.Array:
    held = pa.array(texts, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(held), held.buffers())


def in_lists(texts: pa.Array) -> pa.Array:
    """Puts two texts in each list, after an empty one."""
    return pa.ListArray.from_arrays(pa.array([0, 0, *range(2, len(texts) + 1, 2)], pa.int32()), texts)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "gzip", "lz4", "brotli"])
def test_a_damaged_page_names_the_file(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "a.parquet"
    texts = pa.array([f"user {number}" for number in range(10_000)])
    pq.write_table(pa.table({"user": texts}), path, compression=compression, use_dictionary=False)
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    content = bytearray(path.read_bytes())
    content[start + 200 : start + 2000] = bytes(byte ^ 0x5A for byte in content[start + 200 : start + 2000])
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} is not a valid Parquet file: "):
        values(path, "user")


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (not_utf8([b"a", None, b"b", b"\xff", b"c", b"\xff"]), "bytes that are not UTF-8 text"),
        (pa.array(["a", None, "b", "c\0d", "e", "\0"]), "NUL, which no text may"),
    ],
)
def test_what_is_no_text_is_refused_with_its_row(tmp_path: Path, texts: pa.Array, reason: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": texts, "item": range(6)}), path, row_group_size=2)
    with pytest.raises(UserError) as error:
        values(path, "user")
    assert str(error.value) == f"{path}, row 3: column 'user' holds {reason}"
    assert values(path, "item") == [list("012345")]  # A column that is not read does not matter.
    pq.write_table(pa.table({"tags": in_lists(texts)}), path)
    with pytest.raises(UserError) as error:
        values(path, "tags")
    assert str(error.value) == f"{path}, row 2: column 'tags' holds {reason}"


def test_words_of_vectors_that_are_not_utf8_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "vectors.parquet"
    pq.write_table(pa.table({"word": not_utf8([b"\xff"]), "vector": [[1.0, 2.0]]}), path)
    with pytest.raises(UserError, match=f"^{path} is not a valid Parquet file: "):
        list(read_vectors(str(path), 2))


def test_bytes_behind_missing_texts_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"user": ["a", None, ""], "empty": pa.array([None, None, ""])}), path)
    assert values(path, "user", "empty") == [["a", None, ""], [None, None, ""]]


def test_a_column_without_a_type_holds_missing_values(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"user": ["a", "b"], "none": pa.nulls(2), "lists": pa.array([[None], []], pa.list_(pa.null()))})
    pq.write_table(table, path)
    assert values(path, "user", "none", "lists") == [["a", "b"], [None, None], [[None], []]]
    (source,) = expand_sources(str(path))
    faults: list[Fault] = []
    (rows,) = FORMATS["parquet"].read(Segment(source), ["none"], ("none",), Layout(), faults, uses=Uses())
    assert rows.batch.column("none").type == pa.large_string()
    assert not faults


def test_a_column_without_a_type_gives_the_examples_of_a_csv(tmp_path: Path) -> None:
    schema = ClickSchema(
        file_format="parquet", label="y", dense=("x",), categorical=(CategoricalColumn(name="user", num_rows=10),)
    )
    pq.write_table(pa.table({"y": [1, 0], "x": pa.nulls(2), "user": pa.nulls(2)}), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("y,x,user\n1,,\n0,,\n")
    found = []
    for name in ("parquet", "csv"):
        (source,) = expand_sources(str(tmp_path / f"a.{name}"))
        columns = ("y", "x", "user")
        (rows,) = FORMATS[name].read(Segment(source), columns, columns, Layout(), [], uses=schema.uses)
        found.append(parse_rows(rows, dataclasses.replace(schema, file_format=name), source.url))
    (first, first_wrong), (second, second_wrong) = found
    assert first_wrong == second_wrong == {}
    np.testing.assert_array_equal(first.dense, second.dense)
    assert first.categorical["user"].values.fill_null("").equals(second.categorical["user"].values.fill_null(""))
