"""A table started from a file by name: the same rows on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.testing.threads import outcomes_on_threads, run_threads

WORDS = [f"w{number}" for number in range(101)]
ROWS = {word: row for row, word in enumerate(WORDS)}
DIM = 8


def write_vectors(path: Path) -> dict[str, list[float]]:
    """Every third word, words that the table does not have, and one word twice, of which the first counts."""
    generator = np.random.default_rng(0)
    names = [*WORDS[::3], *(f"unknown{number}" for number in range(50))]
    generator.shuffle(names)
    vectors = {name: generator.normal(size=DIM).round(4).tolist() for name in names}
    lines = [f"{name} {' '.join(map(str, values))}\n" for name, values in vectors.items()]
    path.write_text("".join([*lines, f"{WORDS[3]} {' '.join(['9'] * DIM)}\n"]))
    return vectors


def _start(ranks: Ranks, path: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, et.InitCounts]:
    tables = et.EmbeddingCollection(
        [et.TableSpec("other", 7, DIM, dtype=dtype), et.TableSpec("word", len(WORDS), DIM, dtype=dtype)],
        ranks=ranks,
        seed=3,
    )
    et.optim.RowwiseAdagrad(tables, lr=0.1, initial_accumulator_value=0.5)
    fresh = tables.gather_table("word").clone()
    counts = et.init_from(tables, "word", path, ROWS)
    return fresh, tables.gather_table("word").clone(), tables.gather_table("word", "accumulator").clone(), counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_words_are_copied_and_others_begin_as_usual_on_any_number_of_ranks(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "vectors.txt"
    vectors = write_vectors(path)
    for ranks in (1, 2, 3):
        for fresh, started, accumulator, counts in run_threads(ranks, _start, str(path), dtype):
            for word, row in ROWS.items():
                expected = torch.tensor(vectors[word]).to(dtype) if word in vectors else fresh[row]
                assert torch.equal(started[row], expected), word
            assert torch.equal(accumulator, torch.full_like(accumulator, 0.5))
            assert counts == et.InitCounts(num_copied=34, num_rows=101, num_in_file=85)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a 1 2\n", "expected vectors of dim 8"),
        (f"the {'1 ' * DIM}\nof {'2 ' * DIM}\n", "none of its 2 names is among the table's 101 names"),
        (f"w5 {'nan ' * DIM}\n", "the vector of 'w5' has a value that is not finite"),
    ],
)
def test_a_file_of_no_use_is_refused_on_every_rank(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text(content)
    for outcome in outcomes_on_threads(2, _start, str(path), torch.float32):
        assert isinstance(outcome, et.UserError)
        assert message in str(outcome)


@pytest.mark.parametrize(
    ("value", "dtype"), [("1e300", torch.float32), ("3.4e38", torch.bfloat16), ("-3.4e38", torch.bfloat16)]
)
@pytest.mark.parametrize("suffix", ["txt", "npy"])
def test_a_value_of_a_file_too_large_for_the_table_is_refused(
    tmp_path: Path, value: str, dtype: torch.dtype, suffix: str
) -> None:
    path = tmp_path / f"vectors.{suffix}"
    if suffix == "txt":
        path.write_text(f"x {value}\n")
    else:
        np.save(path, np.array([[float(value)]]))
        (tmp_path / "vectors.npy.vocabulary.tsv").write_text("x\n")
    tables = et.EmbeddingCollection([et.TableSpec("word", 4, 1, dtype=dtype)])
    before = tables.gather_table("word").clone()
    with pytest.raises(et.UserError, match="the vector of 'x' has a value that is not finite in the table's"):
        et.init_from(tables, "word", path, {"x": 0})
    assert torch.equal(tables.gather_table("word"), before)


@pytest.mark.parametrize("row", [4, -1, 1.0, "1", 2**70])
def test_a_row_that_the_table_does_not_have_is_refused(tmp_path: Path, row: object) -> None:
    path = tmp_path / "vectors.txt"
    path.write_text("y 1\nx 1\n")
    tables = et.EmbeddingCollection([et.TableSpec("word", 4, 1)])
    with pytest.raises(et.UserError, match=r"rows of table 'word' must be integers from 0 to 3, got .* for 'x'"):
        et.init_from(tables, "word", str(path), {"x": row, "y": 2})


def test_a_file_whose_fault_comes_late_says_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedtrain.data.vector_files._BLOCK_BYTES", 8)
    path = tmp_path / "vectors.npy"
    np.save(path, np.array([[1.0, 2.0], [3.0, 4.0], [5.0, np.nan]], np.float32))
    (tmp_path / "vectors.npy.vocabulary.tsv").write_text("x\ny\nz\n")
    tables = et.EmbeddingCollection([et.TableSpec("word", 3, 2)])
    before = tables.gather_table("word").clone()
    with pytest.raises(et.UserError, match="Table 'word' already has 2 vectors of the file: create it again"):
        et.init_from(tables, "word", str(path), {"x": 0, "y": 1, "z": 2})
    assert torch.equal(tables.gather_table("word"), torch.cat([torch.tensor([[1.0, 2.0], [3.0, 4.0]]), before[2:]]))
    with pytest.raises(et.UserError, match=r"the vector of 'z' has a value that is not finite in the table's float32$"):
        et.init_from(tables, "word", str(path), {"z": 2})
