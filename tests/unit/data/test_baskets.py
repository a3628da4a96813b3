"""Baskets become sentences, whatever the file and the order of its rows."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedtrain.data.baskets import write_baskets
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError


def lines(path: Path, format: str) -> list[str]:
    text = write_baskets(
        str(path), ("session", "item"), str(path.parent / "cache"), ONE_PROCESS, format=format
    ).text_path
    return sorted(Path(text).read_text(encoding="utf-8").splitlines())


def test_baskets_of_rows_and_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("session,item\n1,a\n2,é\n1,c\n1,a\n2,b\n")
    assert lines(tmp_path / "a.csv", "csv") == ["a c a", "é b"]
    (tmp_path / "a.txt").write_text("u1 a c a\nu2 x\n")
    assert lines(tmp_path / "a.txt", "lines") == ["a c a", "x"]


@pytest.mark.parametrize("item", ["12\x1f1", "a\x0bb", "a\x01b", "a b"])
def test_an_item_that_would_become_several_words_is_refused(tmp_path: Path, item: str) -> None:
    pq.write_table(pa.table({"session": [1, 1], "item": ["x", item]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds white space or a control character, which parts items in a text"):
        lines(tmp_path / "a.parquet", "parquet")


@pytest.mark.parametrize("item", ["", None])
def test_an_empty_item_is_no_id(tmp_path: Path, item: str | None) -> None:
    pq.write_table(pa.table({"session": [1, 1], "item": ["x", item]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1: column 'item' holds no id"):
        lines(tmp_path / "a.parquet", "parquet")


def test_an_item_with_a_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("session\titem\n1\tone two\n")
    with pytest.raises(UserError, match="the item id 'one two' holds white space"):
        lines(tmp_path / "a.tsv", "tsv")
