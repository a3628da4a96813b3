"""The files of a package: tables of any dtype and texts, as the scorer maps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from embedtrain.data.token_hash import text_hashes
from embedtrain.recipes.base import PackedTable
from embedtrain.serve.package import TableDtype, quantised, write_table, write_texts
from embedtrain.serve.scorer import Table, Vocabulary, hashes_of


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("bfloat16", 2**-8), ("int8", 1 / 510)])
@pytest.mark.parametrize("dim", [1, 3, 16])
def test_a_table_comes_back(dtype: TableDtype, tolerance: float, dim: int, tmp_path: Path) -> None:
    rows = torch.rand(7, dim, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with open(tmp_path / "table", "wb") as file:
        write_table(file, PackedTable(7, dim, lambda: rows.split(3)), dtype)
    ids = np.array([6, 0, 3, 3])
    found = Table(str(tmp_path), "table").rows(ids)
    span = (rows.max(dim=1).values - rows.min(dim=1).values)[ids].unsqueeze(1) if dtype == "int8" else 1.0
    assert bool(((found - rows[ids]).abs() <= tolerance * span + 1e-6).all())
    # Other programs read it too.
    assert load_file(tmp_path / "table")["weight"].shape == (7, dim)


def test_rows_of_one_value_are_quantised_exactly() -> None:
    rows = torch.tensor([[0.3, 0.3], [0.0, 0.0], [-2.0, 5.0]])
    levels, scale, bias = quantised(rows)
    restored = levels * scale.unsqueeze(1) + bias.unsqueeze(1)
    assert torch.equal(restored[:2], rows[:2])
    torch.testing.assert_close(restored, rows, atol=1e-5, rtol=0)


def test_texts_are_found_by_their_hashes(tmp_path: Path) -> None:
    texts = [b"", b"a", "\u65e5\u672c".encode(), b"x" * 1000, b"12345678", b"123456789"]
    with open(tmp_path / "texts", "wb") as file:
        write_texts(file, pa.array(texts, pa.large_binary()))
    vocabulary = Vocabulary(str(tmp_path), "texts")
    assert vocabulary.rows([*reversed(texts), b"new", b"1234567"]).tolist() == [6, 5, 4, 3, 2, 1, 0, 0]
    assert vocabulary.text(3) == texts[3]
    assert hashes_of(texts).tolist() == text_hashes(pa.array(texts, pa.large_binary())).tolist()


def test_texts_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = "embedtrain.serve.package.text_hashes", lambda texts: np.full(len(texts), 7, np.uint64)
    monkeypatch.setattr(*same)
    monkeypatch.setattr("embedtrain.serve.scorer.hashes_of", lambda texts: np.full(len(texts), 7, np.uint64))
    with open(tmp_path / "texts", "wb") as file:
        write_texts(file, pa.array([b"a", b"b", b"c"], pa.large_binary()))
    assert Vocabulary(str(tmp_path), "texts").rows([b"c", b"a", b"d"]).tolist() == [3, 1, 0]
