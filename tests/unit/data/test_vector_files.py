from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from embedtrain.data.vector_files import read_vectors
from embedtrain.errors import UserError
from embedtrain.export import Vectors, export_vectors
from embedtrain.export.formats import FORMATS

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
    with pytest.raises(UserError, match=r"(line 3|byte \d+): the name 'na.*' is not UTF-8: the file is damaged"):
        read(tmp_path / "v")


@pytest.mark.parametrize("codec", [gzip, bz2, lzma], ids=lambda codec: codec.__name__)
@pytest.mark.parametrize("binary", [True, False])
def test_names_are_read_as_gensim_reads_them(tmp_path: Path, binary: bool, codec: Any) -> None:
    names = ["prix", "5\u00a0000", "a\u2028b", "x\u3000", "\u0085y", "", "\ufeffz"]
    data = b"7 5\n"
    for name, row in zip(names, VALUES, strict=True):
        data += name.encode() + b" " + (row.tobytes() if binary else " ".join(map(str, row.tolist())).encode()) + b"\n"
    (tmp_path / "v").write_bytes(codec.compress(data))
    found, rows = read(tmp_path / "v")
    assert found == names
    np.testing.assert_allclose(rows, VALUES, rtol=1e-6)
    models = pytest.importorskip("gensim.models", reason="gensim is not installed")
    (tmp_path / "plain").write_bytes(data)
    assert models.KeyedVectors.load_word2vec_format(str(tmp_path / "plain"), binary=binary).index_to_key == names


def lines(separator: str = " ", end: str = "\n") -> str:
    rows = [separator.join([word, *map(str, row)]) for word, row in zip(WORDS, VALUES.tolist(), strict=True)]
    return "".join(f"{row}{end}" for row in rows)


def damaged(change: Callable[[list[str]], Sequence[str]], header: str = "7 5") -> str:
    return "\n".join([header, *change(lines().splitlines())]) + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damaged(lambda rows: [rows[0].rsplit(" ", 1)[0], *rows[1:]]), r"line 2: expected a name and 5 numbers"),
        (damaged(lambda rows: ["", *rows], "7 6"), r"line 3: expected a name and 6 numbers"),
        (damaged(lambda rows: [row.replace(".", ",") for row in rows]), r"line 2: expected a name and 5 numbers"),
        (damaged(lambda rows: [row.replace(" ", ", ") for row in rows]), r"line 2: expected a name and 5 numbers"),
        (
            damaged(lambda rows: rows[:4]),
            r"expected 7 vectors, .* ends after 4 .*, in line 5: the file is cut off",
        ),
        (damaged(lambda rows: [*rows, rows[0]]), r"line 9: expected no more than 7 vectors"),
        (damaged(lambda rows: []), r"expected 7 vectors, .* ends after 0"),
        ("a line of prose\nand another\n", r"line 1: expected a name and some numbers, got 'a line of prose'"),
        ("\n", r"line 1: expected a name and some numbers, got ''"),
        (b"PK\x03\x04....", r"a zip archive, such as npz is not a supported format of vectors"),
        (b"\x80\x04\x95....", r"a Python pickle is not a supported format"),
        (b"7 5\n\xff\x00\x01 tail", r"cannot read those after 0, from byte 4 on"),
        (b"1 1\nab\tc 1\x002\x003\x004\x00", r"byte 4: expected a name and a space, got 'ab\\tc'"),
        (b"1 5\na " + VALUES[0].tobytes() + b"\nb " + VALUES[1].tobytes(), r"end after 1 vectors.* on from byte 26"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_what_is_no_file_of_vectors_or_not_a_whole_one_is_refused_with_the_place(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    (tmp_path / "v").write_bytes(content if isinstance(content, bytes) else content.encode())
    dim = 6 if "7 6" in str(content)[:6] else 1 if "1 1" in str(content)[:6] else 5
    with pytest.raises(UserError, match=message):
        read(tmp_path / "v", dim)


def test_blank_lines_and_numbers_as_names_are_no_header(tmp_path: Path) -> None:
    (tmp_path / "v").write_text("\n" + damaged(lambda rows: ["", *rows, ""]).removeprefix("7 5\n"))
    assert read(tmp_path / "v")[0] == WORDS
    (tmp_path / "v").write_text("7 5\n8 -1.5\n")
    names, rows = read(tmp_path / "v", 1)
    assert (names, rows.tolist()) == (["7", "8"], [[5], [-1.5]])


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


@pytest.mark.parametrize("tail", ["", "\t7"])
def test_names_beside_an_array_may_come_from_windows(tmp_path: Path, tail: str) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    lines = "".join(f"{word}{tail}\r\n" for word in WORDS)
    (tmp_path / "a.npy.vocabulary.tsv").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert read(tmp_path / "a.npy")[0] == WORDS


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


def safetensors_of_a_wrong_size(path: Path) -> None:
    export_vectors(opened(), "safetensors", str(path))
    path.write_bytes(path.read_bytes().replace(b"[7, 5]", b"[8, 5]"))


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
        (safetensors_of_a_wrong_size, r"say that the values \[8, 5\] of F32 take 140 bytes"),
        (safetensors_of_two, r"expected a tensor 'vectors'.*holds a of F32, b of F32"),
        (parquet_of_other_columns, r"expected the columns word and vector; it has name, embedding"),
        (parquet_cut, r"is not a valid Parquet file"),
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
