"""Baskets become sentences, whatever the file and the order of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from embedtrain.data.baskets import write_baskets
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.errors import UserError


def lines(path: Path, format: str) -> list[str]:
    text = write_baskets(str(path), format, ("session", "item"), str(path.parent / "cache"), ONE_PROCESS)
    return sorted(Path(text).read_text(encoding="utf-8").splitlines())


def test_baskets_of_rows_and_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("session,item\n1,a\n2,é\n1,c\n1,a\n2,b\n")
    assert lines(tmp_path / "a.csv", "csv") == ["a c a", "é b"]
    (tmp_path / "a.txt").write_text("u1 a c a\nu2 x\n")
    assert lines(tmp_path / "a.txt", "lines") == ["a c a", "x"]


def test_an_item_with_a_space_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("session\titem\n1\tone two\n")
    with pytest.raises(UserError, match="the item id 'one two' holds white space"):
        lines(tmp_path / "a.tsv", "tsv")
