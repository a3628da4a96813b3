"""Rows have the same scores, and files the same faults, on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from embedtrain.cli import main
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import Runtime
from embedtrain.errors import UserError
from embedtrain.serve import reading
from embedtrain.serve.opening import config_for_files, open_scorer
from embedtrain.serve.scoring import Scored, ScoreOptions, score_rows
from embedtrain.testing.threads import outcomes_on_threads, run_threads
from tests import odd_rows


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_rows.train_run(tmp_path_factory.mktemp("scoring"))


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "UNIT_ROWS", 64)


def score(ranks: Ranks, run: Path, data: Path, max_bad_lines: int = 10_000) -> list[Scored]:
    config = config_for_files(str(run), [])
    scorer = open_scorer(config, Runtime(ranks, ranks.rank, torch.device("cpu")))
    return list(score_rows(scorer, ScoreOptions(str(data), ["id", "shop"], max_bad_lines=max_bad_lines)))


@pytest.mark.usefixtures("small_units")
def test_scores_are_the_same_bits_on_1_2_and_3_ranks(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "odd.csv"
    odd_rows.write_csv(data, 700, seed=2, odd_share=0.3)
    found = []
    for num_ranks in (1, 2, 3):
        first, *others = run_threads(num_ranks, score, run, data)
        assert others == [[]] * (num_ranks - 1)
        ids = [name for part in first for name in part.kept["id"].to_pylist()]
        found.append((ids, np.concatenate([part.probabilities for part in first])))
    ids, scores = found[0]
    assert list(map(int, ids)) == sorted(map(int, ids)) and 500 < len(ids) < 700
    for other_ids, other_scores in found[1:]:
        assert other_ids == ids
        assert np.array_equal(other_scores, scores)


@pytest.mark.usefixtures("small_units")
def test_too_many_bad_lines_end_every_rank_alike(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "odd.csv"
    lines = odd_rows.lines(300, 8, 0.0)
    lines[70] = "70,1,none,1,s1,u1,3,a,a"
    lines[200] = "200"
    data.write_text("\n".join([odd_rows.HEADER, *lines]) + "\n")
    wrong = f"{data}:202: expected 9 fields, got 1; {data}:72: column x0: could not convert string to float: 'none'"
    for num_ranks in (1, 2):
        outcomes = outcomes_on_threads(num_ranks, score, run, data, 1)
        for outcome in outcomes:
            assert isinstance(outcome, UserError)
            assert str(outcome) == (
                f"{wrong}. At least 2 bad lines exceed data.max_bad_lines=1: correct them, or raise "
                "data.max_bad_lines to skip them"
            )
        assert sum(len(part.labels) for part in run_threads(num_ranks, score, run, data, 2)[0]) == 298


def test_a_file_of_a_header_alone_is_not_measured(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "bare.csv"
    data.write_text(f"{odd_rows.HEADER}\n")
    capfd.readouterr()
    assert main(["evaluate", str(run), "--data", str(data)]) == 2
    shown = capfd.readouterr()
    assert shown.err.splitlines()[-1] == (f"embedtrain: error: {data} has no usable rows: nothing can be measured")
    assert shown.out == ""


def test_predict_does_not_replace_its_own_input(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    odd_rows.write_csv(tmp_path / "odd.csv", 5, odd_share=0.0)
    before = (tmp_path / "odd.csv").read_bytes()
    Path("days").mkdir()
    Path("days/link.csv").symlink_to(tmp_path / "odd.csv")
    for data in ("odd.csv", "o*.csv", str(tmp_path), "days/link.csv"):
        assert main(["predict", str(run), "--data", data, "--output", "./odd.csv", "--overwrite"]) == 2
        assert "--output ./odd.csv is one of the input files of --data: give another name" in capfd.readouterr().err
    assert (tmp_path / "odd.csv").read_bytes() == before
