from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from embedtrain.data.vector_files import read_vectors
from embedtrain.errors import UserError
from embedtrain.export import FORMATS, Vectors, export_vectors

WORDS = ["the", "naïve", "日本", '"', "it's", "a,b", "12"]
VALUES = np.random.default_rng(3).normal(size=(len(WORDS), 5)).astype(np.float32)


def opened(values: np.ndarray = VALUES) -> Vectors:
    counts = np.arange(len(values), 0, -1)
    return Vectors(
        "word", 1, len(values), values.shape[1], WORDS[: len(values)], counts, lambda start, stop: values[start:stop]
    )


def read(path: Path | str, dim: int = 5) -> tuple[list[str], np.ndarray]:
    names: list[str] = []
    rows = [np.zeros((0, dim), np.float32)]
    for block in read_vectors(str(path), dim):
        names += block.names
        rows.append(block.rows(np.arange(len(block.names))))
    return names, np.concatenate(rows)


@pytest.mark.parametrize("blocks", ["one", "many"])
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "projector"])
def test_every_format_that_export_writes_is_read(
    tmp_path: Path, format: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if blocks == "many":
        monkeypatch.setattr("embedtrain.data.vector_files._BLOCK_BYTES", 40)
    path = export_vectors(opened(), format, str(tmp_path / "vectors"))[0]
    names, rows = read(path)
    assert names == WORDS
    np.testing.assert_array_equal(rows, VALUES)


@pytest.mark.parametrize("binary", [False, True])
def test_what_gensim_writes_is_read(tmp_path: Path, binary: bool) -> None:
    models = pytest.importorskip("gensim.models", reason="gensim is not installed")
    vectors = models.KeyedVectors(5)
    vectors.add_vectors(WORDS, VALUES)
    vectors.save_word2vec_format(str(tmp_path / "out"), binary=binary)
    names, rows = read(tmp_path / "out")
    assert names == WORDS
    np.testing.assert_array_equal(rows, VALUES)


@pytest.mark.parametrize("format", ["word2vec-binary", "npy", "safetensors"])
def test_binary_formats_are_read_compressed(tmp_path: Path, format: str) -> None:
    path = Path(export_vectors(opened(), format, str(tmp_path / "vectors"))[0])
    packed = path.with_suffix(".bin.gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    names = tmp_path / f"{path.name}.vocabulary.tsv"
    if names.exists():
        names.rename(tmp_path / f"{packed.name}.vocabulary.tsv")
    names_read, rows = read(packed)
    assert names_read == WORDS
    np.testing.assert_array_equal(rows, VALUES)


@pytest.mark.parametrize("binary", [True, False])
def test_a_name_that_was_cut_within_a_letter_costs_no_other(tmp_path: Path, binary: bool) -> None:
    names = [*(word.encode() for word in WORDS[:6]), ("щ" * 60).encode()[:99]]
    data = b"7 5\n"
    for name, row in zip(names, VALUES, strict=True):
        data += name + b" " + (row.tobytes() if binary else " ".join(map(str, row.tolist())).encode()) + b"\n"
    (tmp_path / "v").write_bytes(data)
    found, rows = read(tmp_path / "v")
    assert found == [*WORDS[:6], "щ" * 49 + "\ufffd"]
    np.testing.assert_allclose(rows, VALUES, rtol=1e-6)
    (tmp_path / "v").write_bytes(data.replace(WORDS[1].encode(), b"na\xefve"))
    with pytest.raises(UserError, match="is not UTF-8: the file is damaged"):
        read(tmp_path / "v")


def lines(separator: str = " ", end: str = "\n") -> str:
    rows = [separator.join([word, *map(str, row)]) for word, row in zip(WORDS, VALUES.tolist(), strict=True)]
    return "".join(f"{row}{end}" for row in rows)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("glove.txt", lines()),
        ("no-newline.txt", lines().removesuffix("\n")),
        ("fasttext.vec", f"{len(WORDS)} 5\n{lines(end=chr(32) + chr(10))}"),
        ("tabs.tsv", lines("\t")),
        ("windows.txt", lines(end="\r\n")),
        ("blank-line.txt", lines() + "\n"),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_text_of_other_programs_is_read(tmp_path: Path, name: str, text: str, is_compressed: bool) -> None:
    path = tmp_path / (f"{name}.gz" if is_compressed else name)
    path.write_bytes(gzip.compress(text.encode()) if is_compressed else text.encode())
    names, rows = read(path)
    assert names == WORDS
    np.testing.assert_allclose(rows, VALUES, rtol=1e-6)


def test_a_name_of_glove_may_hold_spaces(tmp_path: Path) -> None:
    (tmp_path / "glove.txt").write_text("the 1 2\nat name@domain.com 3 4\n. . . 5 6\n")
    names, rows = read(tmp_path / "glove.txt", 2)
    assert names == ["the", "at name@domain.com", ". . ."]
    assert rows.tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_of_other_widths_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.tensor(VALUES).to(dtype)
    safetensors.torch.save_file({"embedding": tensor}, tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors.vocabulary.tsv").write_text("\n".join(WORDS))
    np.testing.assert_array_equal(read(tmp_path / "a.safetensors")[1], tensor.float().numpy())


def test_vectors_that_nobody_wants_are_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a 1 2\nb x y\nc 3 4\n")
    (block,) = read_vectors(str(tmp_path / "a.txt"), 2)
    assert block.rows(np.array([2, 0])).tolist() == [[3, 4], [1, 2]]
    with pytest.raises(UserError, match="line 2: expected 2 numbers after the name"):
        block.rows(np.array([0, 1]))


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content)


def cut_binary(path: Path) -> None:
    export_vectors(opened(), "word2vec-binary", str(path))
    path.write_bytes(path.read_bytes()[:-9])


def npy_without_names(path: Path) -> None:
    np.save(path, VALUES)


def npy_with_few_names(path: Path) -> None:
    np.save(path, VALUES)
    path.with_name(path.name + ".vocabulary.tsv").write_text("a\nb\n")


def npy_of_integers(path: Path) -> None:
    np.save(path, VALUES.astype(int))


def npy_cut(path: Path) -> None:
    export_vectors(opened(), "npy", str(path))
    path.write_bytes(path.read_bytes()[:-9])


def safetensors_of_two(path: Path) -> None:
    safetensors.numpy.save_file({"a": VALUES, "b": VALUES}, path)


def parquet_of_other_columns(path: Path) -> None:
    pq.write_table(pa.table({"name": ["a"], "embedding": [[1.0]]}), path)


def parquet_cut(path: Path) -> None:
    export_vectors(opened(), "parquet", str(path))
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (text("the 1 2 3\n"), r"expected vectors of dim 5.*found dim 3.*give the table dim 3"),
        (text("3 4\nthe 1 2 3 4\n"), r"expected vectors of dim 5.*found dim 4"),
        (text("the 1 2 3 4 5\na 1 2 3\n"), r"line 2: expected a name and 5 values, got 4 fields"),
        (text("2 5\nthe 1 2 3 4 5\n\na 1 2 3 x 5\n"), r"line 4: expected 5 numbers after the name"),
        (cut_binary, r"expected 7 vectors of dim 5.*after 6"),
        (npy_without_names, r"needs the names of its rows beside it.*vocabulary\.tsv"),
        (npy_with_few_names, r"has 7 rows, and .* 2 names"),
        (npy_of_integers, r"expected floating-point values.*int64"),
        (npy_cut, r"ends before row 7 of 7"),
        (safetensors_of_two, r"expected a tensor 'vectors'.*holds a of F32, b of F32"),
        (parquet_of_other_columns, r"expected the columns word and vector; it has name, embedding"),
        (parquet_cut, r"cannot be read as Parquet"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_name(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "vectors.npy"
    write(path)
    with pytest.raises(UserError, match=re.escape(str(path)) + ".*" + message):
        read(path)


def test_a_path_that_is_no_file_names_those_that_are(tmp_path: Path) -> None:
    (tmp_path / "vectors.txt").write_text(lines())
    with pytest.raises(UserError, match=r"did you mean .*vectors\.txt"):
        read(tmp_path / "vector.txt")
