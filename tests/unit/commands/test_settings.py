"""Names that YAML would change name what they say, in whole runs."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embedtrain.checkpoint import CheckpointReader, latest_checkpoint
from embedtrain.cli import main

SMALL = ["table.dim=4", "train.epochs=1", "train.words_per_step=64", "train.block_words=32", "log.tensorboard=false"]


def words_of(run: Path) -> set[str]:
    return {line.split("\t")[0] for line in (run / "vocabulary.tsv").read_text().splitlines()}


def train(*settings: str) -> int:
    return main(["train", "config.yaml", *SMALL, "data.cache_path=cache", "data.min_count=1", *settings])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()
    Path("corpus").write_text("first x y z\n" * 50)


def test_a_file_whose_name_holds_a_hash_is_that_file() -> None:
    Path("corpus #2.txt").write_text("second x y z\n" * 50)
    assert train("data.path=corpus #2.txt", "run.path=run") == 0
    assert words_of(Path("run")) == {"second", "x", "y", "z"}


def test_runs_whose_names_differ_after_a_hash_are_two_runs() -> None:
    for number in (1, 2):
        assert train("data.path=corpus", f"run.path=trial #{number}", f"seed={number}") == 0
    assert sorted(path.name for path in Path().glob("trial*")) == ["trial #1", "trial #2"]
    assert main(["inspect", "trial #2"]) == 0


def test_a_file_whose_name_holds_a_colon_is_that_file() -> None:
    Path("a: b.txt").write_text("third x y z\n" * 50)
    assert train("data.path=[corpus,a: b.txt]", "run.path=run") == 0
    assert words_of(Path("run")) == {"first", "third", "x", "y", "z"}


def test_a_run_in_micro_batches_trains_the_same_words() -> None:
    rows = []
    for parts in (1, 2):
        assert train("data.path=corpus", f"run.path=run{parts}", f"train.accumulate_steps={parts}") == 0
        path = latest_checkpoint(f"run{parts}/checkpoints")
        assert path is not None
        with CheckpointReader(path) as reader:
            rows.append(reader.gather("input/weight", torch.arange(4)))
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-6)


def test_tf32_on_a_cpu_is_refused_before_anything_is_prepared(capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["data.path=corpus", "data.cache_path=cache", "run.path=run", "run.device=cpu", "train.tf32=true"]
    assert main(["train", "retrieval", *settings]) != 0
    assert "train.tf32=true needs a GPU with TF32" in capsys.readouterr().err
    assert not Path("cache").exists()


@pytest.mark.parametrize("is_in_file", [False, True])
def test_columns_called_no_and_01_are_those_columns(is_in_file: bool) -> None:
    pq.write_table(pa.table({"no": [1] * 9, "01": ["a", "b", "c"] * 3}), "c.parquet")
    settings = ["data.path=c.parquet", "data.format=parquet", "run.path=run"]
    if is_in_file:
        Path("config.yaml").write_text("data: {basket_column: no, item_column: 01}\n")
    else:
        settings += ["data.basket_column=no", "data.item_column=01"]
    assert train(*settings) == 0
    assert words_of(Path("run")) == {"a", "b", "c"}
