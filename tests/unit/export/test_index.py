"""An index of faiss finds what all rows would, as far as its kind promises."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from embedtrain import cli
from embedtrain.errors import UserError
from embedtrain.export import neighbors, open_vectors
from embedtrain.export.index import (
    IndexedRows,
    IndexKind,
    _sample,
    build_index,
    export_index,
    open_index,
    require_index_of,
)
from embedtrain.export.vectors import unit_rows
from tests.unit.export.conftest import MakeRun

faiss = pytest.importorskip("faiss", reason="faiss is not installed: pip install 'embedtrain[ann]'")

KINDS: tuple[IndexKind, ...] = ("flat", "ivfpq", "hnsw")


def clustered(num_rows: int, dim: int = 16) -> np.ndarray:
    """Returns vectors around 40 centres, every tenth of them zero."""
    generator = np.random.default_rng(num_rows)
    rows = generator.normal(size=(40, dim))[generator.integers(0, 40, num_rows)]
    rows += 0.4 * generator.normal(size=(num_rows, dim))
    rows[::10] = 0
    return rows.astype(np.float32)


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("ivfpq", 0.7), ("hnsw", 0.97)])
def test_neighbors_by_an_index_are_those_by_all_rows(
    kind: str, least: float, make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = clustered(1500)
    words = [f"w{row}" for row in range(len(rows))]
    run, index = make_run({"word": rows}, words, state={"export_table": "word"}), str(tmp_path / "words.faiss")
    assert cli.main(["export", run, "--format", "faiss", "--kind", kind, "--output", index]) == 0
    *paths, said = capsys.readouterr().out.splitlines()
    assert paths == [index, f"{index}.vocabulary.tsv", f"{index}.json"]
    assert said.startswith(f"{kind}, cosine: recall@20 ") and said.endswith("; 150 zero vectors are not indexed")
    recall, approximate = (float(said.replace("(", " ").split()[place]) for place in (3, 4))
    assert recall >= approximate >= least and recall >= 0.97
    assert json.loads(Path(f"{index}.json").read_text())["recall"] == pytest.approx(recall, abs=1e-4)
    assert Path(f"{index}.vocabulary.tsv").read_text().startswith("w0\t")

    shared = 0
    for word in ("w1", "w2", "w1 - w2 + w33", "w1499"):
        assert cli.main(["neighbors", run, *word.split(), "--top", "20"]) == 0
        exact = capsys.readouterr().out.splitlines()
        assert cli.main(["neighbors", run, *word.split(), "--top", "20", "--index", index]) == 0
        found = capsys.readouterr().out.splitlines()
        assert len(found) == 21 and found == sorted(found, key=lambda line: line.startswith("  "))
        shared += len(set(exact[1:]) & set(found[1:]))
    assert shared >= 72


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 2, 7, 300])
def test_small_tables_have_an_index_too(kind: IndexKind, num_rows: int, make_run: MakeRun) -> None:
    rows = np.random.default_rng(0).normal(size=(num_rows, 3)).astype(np.float32)
    vectors = open_vectors(make_run({"word": rows}))
    index = build_index(vectors, kind)
    assert index.facts.recall == pytest.approx(1, abs=0.25 if kind == "ivfpq" and num_rows == 300 else 1e-9)
    found = neighbors(vectors, "0", top=5, index=index)
    assert len(found) == min(5, num_rows - 1)
    assert [cosine for _, cosine in found] == sorted((cosine for _, cosine in found), reverse=True)


def test_many_zero_and_equal_vectors_do_no_harm(make_run: MakeRun) -> None:
    rows = np.zeros((500, 8), np.float32)
    rows[:20] = 1
    rows[20:40] = np.random.default_rng(0).normal(size=(20, 8))
    vectors = open_vectors(make_run({"word": rows}))
    for kind in KINDS:
        index = build_index(vectors, kind)
        assert index.facts.num_zero == 460
        assert index.facts.recall > 0.7
        found = neighbors(vectors, "25", top=50, index=index)
        assert 30 <= len(found) <= 39 and all(int(word) < 40 for word, _ in found)
    with pytest.raises(UserError, match="add up to zero"):
        neighbors(vectors, "100", index=index)
    zeros = open_vectors(make_run({"word": rows[100:]}, name="zeros"))
    with pytest.raises(UserError, match="cannot index table 'word': all its vectors are zero"):
        build_index(zeros, "flat")
    rows[30, 2] = np.nan
    damaged = open_vectors(make_run({"word": rows}, name="damaged"))
    with pytest.raises(UserError, match="cannot index the vector of '30': it is not finite"):
        build_index(damaged, "flat")


def test_dot_products_are_of_vectors_as_they_are(make_run: MakeRun, tmp_path: Path) -> None:
    rows = np.float32([[1, 0], [0.9, 0.1], [0, 5], [3, 3]])
    vectors = open_vectors(make_run({"word": rows}))
    export_index(vectors, f"memory://{tmp_path.name}/x", "flat", "dot")
    index = open_index(f"memory://{tmp_path.name}/x")
    found, scores = index.best(vectors, np.float32([1, 0.5]), 3)
    assert (found.tolist(), scores.tolist()) == ([3, 2, 0], [4.5, 2.5, 1.0])
    with pytest.raises(UserError, match=r"4 rows of 2, for dot, not from table 'word' at step 12, .* for cosine"):
        require_index_of(index, IndexedRows.of(vectors), "x")


def test_rows_that_are_not_zero_are_measured_wherever_they_lie(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rows at even spaces are zero, and one in three of the others is too.
    monkeypatch.setattr("embedtrain.export.index._TRAINED_ROWS", 100)
    rows = np.zeros((3000, 8), np.float32)
    filled = np.array([row for row in range(3000) if row % 2 and row % 3])
    rows[filled] = clustered(len(filled), 8) + 3
    vectors = open_vectors(make_run({"word": rows}))
    for kind in KINDS:
        facts = build_index(vectors, kind).facts
        assert facts.num_zero == 2000 and facts.recall >= facts.approximate_recall > 0.4
        assert facts.recall > 0.9
    numbers, sample = _sample(vectors, "dot")
    np.testing.assert_array_equal(numbers, filled[::8])
    np.testing.assert_array_equal(sample, rows[filled[::8]])


def test_the_recall_is_that_of_the_answers(make_run: MakeRun) -> None:
    table = clustered(1500)
    vectors = replace(open_vectors(make_run({"word": table})), read=lambda start, stop: table[start:stop])
    index = build_index(vectors, "ivfpq")
    flat = build_index(vectors, "flat")
    hits, of_index, rows = 0, 0, [row for row in range(1, 1500, 7) if row % 10]
    for row in rows:
        query = unit_rows(vectors.rows(row, row + 1))[0]
        exact, found = (each.best(vectors, query, 21)[0].tolist() for each in (flat, index))
        near = index.search(query[None], 21)[0].tolist()
        hits += len(set(exact) & set(found)) - 1
        of_index += len(set(exact) & set(near)) - 1
    assert index.facts.recall == pytest.approx(hits / (20 * len(rows)), abs=0.02)
    assert index.facts.approximate_recall == pytest.approx(of_index / (20 * len(rows)), abs=0.03)
    assert index.facts.recall > index.facts.approximate_recall + 0.05


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["neighbors", "NEWER", "1", "--index", "index"],
            "was built from table 'word' at step 12, 30 rows of 4, for cosine",
        ),
        (["neighbors", "RUN", "1", "--index", "none"], "none is not an index: it or none.json does not exist"),
        (["neighbors", "RUN", "1", "--index", "damaged"], "damaged is not a faiss index: "),
        (["neighbors", "RUN", "1", "--index", "odd"], "odd.json does not describe an index: "),
        (
            ["neighbors", "OTHER", "1", "--index", "index"],
            "index was built from another run with the same table 'word' at step 12, 30 rows of 4: export",
        ),
        (
            ["neighbors", "RUN", "1", "--index", "mixed"],
            "mixed is not the index that mixed.json describes: expected an IndexIDMap of 30 vectors of dim 4, found "
            "IndexIDMap of 29 vectors of dim 4",
        ),
        (
            ["neighbors", "RUN", "1", "--index", "misnamed"],
            "misnamed is not the index that misnamed.json describes: expected IndexHNSWFlat (kind hnsw), found",
        ),
        (["export", "RUN", "--format", "faiss", "--output", "index"], "index already exists"),
        (
            ["export", "RUN", "--format", "faiss", "--output", "x.gz"],
            "files of the format faiss are not compressed",
        ),
        (
            ["export", "RUN", "--format", "npy", "--kind", "flat", "--output", "x"],
            "--kind is for an index: give",
        ),
        (
            ["export", "RUN", "--format", "faiss", "--max-rows", "2", "--output", "x"],
            "--max-rows cannot be given: an index holds",
        ),
    ],
)
def test_mistakes_are_named(
    arguments: list[str],
    expected: str,
    make_run: MakeRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    runs = {"RUN": make_run({"word": rows}), "NEWER": make_run({"word": rows}, step=13, name="newer")}
    assert cli.main(["export", runs["RUN"], "--format", "faiss", "--kind", "flat", "--output", "index"]) == 0
    Path("damaged").write_bytes(Path("index").read_bytes()[:50])
    Path("damaged.json").write_text(Path("index.json").read_text())
    Path("odd.json").write_text("{}")
    Path("misnamed").write_bytes(Path("index").read_bytes())
    Path("misnamed.json").write_text(Path("index.json").read_text().replace('"flat"', '"hnsw"'))
    shorter = rows.copy()
    shorter[3] = 0
    runs["OTHER"] = make_run({"word": shorter}, name="other")
    with open_vectors(runs["OTHER"]) as others:
        export_index(others, "mixed", "flat")
    Path("mixed.json").write_text(Path("index.json").read_text())
    assert cli.main([runs.get(word, word) for word in arguments]) == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert cli.main(["neighbors", runs["RUN"], "1", "--index", "index"]) == 2
    assert "an index needs the package faiss: pip install 'embedtrain[ann]'" in capsys.readouterr().err
