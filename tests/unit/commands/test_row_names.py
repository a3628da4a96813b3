"""Every command calls a row by its name: a value, a raw id, or the hash of values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.cli import main
from embedtrain.data.vector_files import read_vectors
from embedtrain.export import open_vectors

CITIES = ["50", "7", "100", "3", "20"]
"""Values that look like numbers of rows."""

STILL = ("optimizer.lr=1e-30", "optimizer.weight_decay=0", "log.tensorboard=false", "data.cache_path=cache")
"""Rows stay as they begin."""

RANKING = (
    "ranking.yaml",
    "table.dim=4",
    "data.path=clicks.csv",
    "data.categorical=[item,site,slot]",
    "data.features.site.num_rows=10",
    "data.features.slot={encoding: id, num_rows: 4}",
    "train.global_batch_size=32",
    *STILL,
)
RETRIEVAL = (
    "retrieval.yaml",
    "table.dim=4",
    "data.path=pairs.txt",
    "items.path=items.csv",
    "items.features={color: {}}",
    "train.epochs=1",
    "train.global_batch_size=8",
    *STILL,
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [f"{n % 2},{CITIES[n % 5 if n % 3 else 0]},s{n % 7} x,{n % 4}\n" for n in range(320)]
    Path("clicks.csv").write_text("label,item,site,slot\n" + "".join(lines))
    for model in ("ranking", "retrieval"):
        Path(f"{model}.yaml").write_text(f"model: {model}\n")
    Path("pairs.txt").write_text("".join(f"u{n} {CITIES[n % 5]} {CITIES[n % 3]}\n" for n in range(40)))
    Path("items.csv").write_text("id,color\n" + "".join(f"{city},{'rb'[n % 2]}\n" for n, city in enumerate(CITIES)))


def rows_of(run: str, table: str) -> dict[str, np.ndarray]:
    with open_vectors(run, table) as vectors:
        return dict(zip(vectors.words, vectors.rows(0, vectors.num_rows), strict=True))


def read(path: str) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for block in read_vectors(path, 4):
        found.update(zip(block.names, block.rows(np.arange(len(block.names))), strict=True))
    return found


@pytest.mark.parametrize("format", ["word2vec", "npy"])
def test_exported_vectors_start_the_rows_of_their_names(format: str) -> None:
    assert main(["train", *RANKING, "run.path=first"]) == 0
    assert main(["export", "first", "--table", "item", "--format", format, "--output", "item.x"]) == 0
    exported, first = read("item.x"), rows_of("first", "item")
    assert set(exported) == {"<unk>", *CITIES}
    assert all(np.array_equal(exported[name], row) for name, row in first.items())
    # In the other log other values are frequent, so that each value has another row.
    lines = Path("clicks.csv").read_text().splitlines(keepends=True)
    Path("clicks.csv").write_text(
        "".join(line for number, line in enumerate(lines) if number < 60 or ",50," not in line)
    )
    assert main(["train", *RANKING, "run.path=second", "seed=2", "data.features.item.init_from=item.x"]) == 0
    second = rows_of("second", "item")
    assert list(second) != list(first)
    assert all(np.array_equal(exported[name], row) for name, row in second.items())


def test_neighbors_diff_and_evaluate_know_values_ids_and_hashes(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *RANKING, "run.path=run"]) == 0
    capfd.readouterr()
    assert main(["neighbors", "run", "50", "--table", "item"]) == 0
    assert {line.split()[1] for line in capfd.readouterr().out.splitlines()[1:]} == {"<unk>", "7", "100", "3", "20"}
    assert main(["neighbors", "run", "5", "--table", "item"]) == 2
    assert (
        "unknown value '5': it is not one of the 6 values of table 'item'; did you mean '50'" in capfd.readouterr().err
    )
    with open_vectors("run", "site") as vectors:
        row = vectors.row_of("s3 x")
    assert main(["neighbors", "run", "s3", "x", "--table", "site", "--top", "20"]) == 0
    near = {line.split()[1] for line in capfd.readouterr().out.splitlines()[1:]}
    assert near == {f"hash:{n}/10" for n in range(10) if n != row}
    assert main(["neighbors", "run", "3", "--table", "slot"]) == 0
    assert {line.split()[1] for line in capfd.readouterr().out.splitlines()[1:]} == {"0", "1", "2"}
    assert main(["train", *RANKING, "run.path=other", "seed=2"]) == 0
    capfd.readouterr()
    assert main(["diff", "run", "other", "--table", "item", "--top", "9"]) == 0
    assert {line.split()[-1] for line in capfd.readouterr().out.splitlines()[5:]} == {"<unk>", *CITIES}
    Path("pairs.tsv").write_text("50\t7\t3\n7\t100\t2\n3\t20\t1\n")
    assert main(["evaluate", "run", "--table", "item", "--similarity", "pairs.tsv"]) == 0
    assert "over 3 pairs" in capfd.readouterr().out


def test_hashed_rows_do_not_start_from_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *RANKING, "run.path=run"]) == 0
    assert main(["export", "run", "--table", "site", "--format", "word2vec", "--output", "site.txt"]) == 0
    assert list(read("site.txt")) == [f"hash:{n}/10" for n in range(10)]
    assert main(["train", *RANKING, "run.path=other", "data.features.site.init_from=site.txt"]) == 2
    assert "data.features.site.init_from needs rows with names" in capfd.readouterr().err
    assert main(["export", "run", "--table", "slot", "--format", "word2vec", "--output", "slot.txt"]) == 0
    start = "data.features.slot={encoding: id, num_rows: 4, init_from: slot.txt}"
    assert main(["train", *RANKING, "run.path=ids", "seed=5", start]) == 0
    rows = rows_of("ids", "slot")
    assert all(np.array_equal(row, rows[name]) for name, row in read("slot.txt").items())


def test_items_of_retrieval_start_from_an_export_and_categories_have_names(capfd: pytest.CaptureFixture[str]) -> None:
    own = [setting for setting in RETRIEVAL if not setting.startswith("items.")]
    assert main(["train", *own, "run.path=first"]) == 0
    assert main(["export", "first", "--table", "item", "--format", "word2vec", "--output", "items.txt"]) == 0
    Path("pairs.txt").write_text("".join(f"u{n} {CITIES[4 - n % 5]} {CITIES[4 - n % 3]}\n" for n in range(40)))
    assert main(["train", *own, "run.path=second", "seed=2", "items.init_from=items.txt"]) == 0
    exported = read("items.txt")
    with CheckpointReader(str(latest_checkpoint("second/checkpoints"))) as reader:
        assert reader.state["init_from"]["item"]["num_copied"] == 5
    second = rows_of("second", "item")
    assert all(np.array_equal(exported[name], row) for name, row in second.items())
    assert list(second) != list(exported)

    assert main(["train", *RETRIEVAL, "run.path=towers"]) == 0
    capfd.readouterr()
    assert main(["neighbors", "towers", "r", "--table", "item.color"]) == 0
    assert capfd.readouterr().out.split()[-1] == "b"
    assert main(["neighbors", "towers", "r", "--table", "item.colour"]) == 2
    assert "'towers' has no table 'item.colour'; it has item, item.color, user" in capfd.readouterr().err
