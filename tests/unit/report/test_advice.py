from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedtrain.checkpoint import latest_checkpoint
from embedtrain.cli import main
from embedtrain.distributed.ranks import ONE_PROCESS
from embedtrain.distributed.runtime import Runtime
from embedtrain.metrics.figures import Bars, Table
from embedtrain.report.advice import advice
from embedtrain.report.curves import RunCurves
from embedtrain.report.facts import RunFacts, TableFacts, epochs_done, read_facts
from embedtrain.report.rows import project
from embedtrain.report.writing import recipe_sections
from embedtrain.train.state import TrainState
from tests.unit.report.made import made_facts


def facts(
    losses: list[float], curves: dict[str, tuple[list[int], list[float]]] | None = None, **changes: Any
) -> RunFacts:
    logged = {"loss": (list(range(len(losses))), losses), "learning_rate": ([1], [0.5])} if curves is None else curves
    return made_facts(**{"logged": RunCurves(logged), **changes})


def falling(count: int = 16) -> list[float]:
    return [3.0 - 0.1 * step for step in range(count)]


def test_nothing_is_advised_where_nothing_looks_wrong() -> None:
    assert advice(facts(falling())) == []


ANEW = "Other settings than train.epochs make another run"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"curves": {"loss": (list(range(16)), [2.0] * 16)}},
            ["The loss is flat, 2 in the first quarter", ANEW],
        ),
        ({"curves": {"loss": (list(range(16)), falling()[::-1])}}, ["The loss rose", ANEW]),
        (
            {"curves": {"stage/busiest_rank": ([1, 2, 3, 4], [1.1, 1.6, 1.5, 1.7])}},
            ["The ranks are uneven: the busiest works 1.55 times"],
        ),
        ({"num_skipped": 3}, ["3 steps were left out", ANEW]),
        (
            {"tables": [TableFacts("word", 100, 8, 40)]},
            ["40% of the rows of table word were never trained: their names", ANEW],
        ),
        (
            {"tables": [TableFacts("word", 100, 8, 40)], "epochs": 0.357},
            [
                "40% of the rows of table word were never trained: the run has not come through its data yet "
                "(35.70% of an epoch).",
                ANEW,
            ],
        ),
    ],
)
def test_what_looks_wrong_is_told(changes: dict[str, object], told: list[str]) -> None:
    lines = advice(facts(falling(), **changes))
    assert len(lines) == len(told), lines
    for line, beginning in zip(lines, told, strict=True):
        assert line.startswith(beginning)


def test_a_model_that_learns_by_heart_is_not_advised_to_train_longer() -> None:
    worse = ([1, 2], [0.5, 0.6])
    by_heart, short, _ = advice(facts([], {"loss": ([1, 2], [3.0, 2.0]), "valid_log_loss": worse}))
    assert by_heart.startswith("The model learns the training data by heart") and short.startswith("The run is short")
    assert short.endswith("whether it falls. Lower log.every_steps.")


@pytest.mark.parametrize(
    ("epoch", "step_in_epoch", "logged", "expected"),
    [
        (0, 25, ([10, 20], [0.1, 0.2]), 0.25),
        (0, 25, ([10, 20, 30], [0.1, 0.2, 0.3]), 0.25),
        (2, 50, ([240], [2.4]), 2.5),
        (3, 0, ([7], [0.07]), 3.0),
        (0, 25, ([], []), 0.0),
        (0, 25, ([0], [0.0]), 0.0),
    ],
)
def test_epochs_that_are_done_are_counted_with_their_fraction(
    epoch: int, step_in_epoch: int, logged: tuple[list[int], list[float]], expected: float
) -> None:
    state = TrainState(step=epoch * 100 + step_in_epoch, epoch=epoch, step_in_epoch=step_in_epoch)
    assert epochs_done(state, {"epoch": logged}) == pytest.approx(expected)


def test_the_map_keeps_the_largest_differences_and_its_signs() -> None:
    generator = np.random.default_rng(3)
    rows = generator.normal(size=(50, 6)).astype(np.float32) * np.array([5, 3, 0.1, 0.1, 0.1, 0.1], np.float32)
    points = project(rows)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    spread = np.linalg.svd(unit - unit.mean(0))[1]
    np.testing.assert_allclose(np.linalg.norm(points - points.mean(0), axis=0), spread[:2], rtol=1e-4)
    np.testing.assert_array_equal(points, project(rows.copy()))
    assert project(np.ones((3, 1), np.float32)).shape == (3, 2)


GOOD: list[str] = []
RANKING = ["data.categorical=[c]", "data.path=train.csv", "data.valid_path=valid.csv", "train.global_batch_size=32"]


def ranking_rows(seed: int, count: int, num_values: int, noise: float) -> str:
    """Labels that go by a value's parity, but for noise."""
    generator = np.random.default_rng(seed)
    values = generator.integers(num_values, size=count)
    labels = np.where(generator.random(count) < noise, generator.integers(2, size=count), values % 2)
    return "c,label\n" + "".join(f"v{value},{label}\n" for value, label in zip(values, labels, strict=True))


def advice_of(folder: Path, *settings: str, num_values: int = 3, noise: float = 0.2, rows: int = 640) -> list[str]:
    """Trains a ranking model and returns what the report of the run advises."""
    (folder / "train.csv").write_text(ranking_rows(1, rows, num_values, noise))
    (folder / "valid.csv").write_text(ranking_rows(2, rows, num_values, noise))
    log = "log={every_steps: 5, tensorboard: false}"
    run = ["data.cache_path=cache", "run.path=run", "table.dim=4", "ranking.top=[8]", log, "train.epochs=4"]
    assert main(["train", "ranking.yaml", *RANKING, *run, *settings]) == 0
    return advice(read_facts("run"))


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        (["optimizer.lr=0.1", "dense_optimizer.lr=0.01"], {}, GOOD),
        (["train.epochs=1"], {"rows": 64}, ["The run is short: 2 steps with 1 records of the loss"]),
        (["optimizer.lr=1e-7", "dense_optimizer.lr=1e-7"], {}, ["The loss is flat"]),
        (
            ["optimizer.lr=0.2", "dense_optimizer.lr=0.02", "train.epochs=20", "schedule.name=constant"],
            {"num_values": 300, "noise": 0.9},
            ["The model learns the training data by heart: the loss falls, and valid_log_loss was best at step"],
        ),
        (
            ["data.num_rows=100", "optimizer.lr=0.1", "dense_optimizer.lr=0.01"],
            {},
            ["97% of the rows of table c were never trained: its values need fewer rows"],
        ),
    ],
    ids=["good", "short", "flat", "overfit", "sparse"],
)
def test_a_run_that_has_a_fault_is_told_so_and_no_other(
    settings: list[str], options: dict[str, Any], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ranking.yaml").write_text("model: ranking\n")
    found = advice_of(tmp_path, *settings, **options)
    if told is GOOD:
        scores, columns = recipe_sections(
            "run", Runtime(ONE_PROCESS, 0, torch.device("cpu")), latest_checkpoint("run/checkpoints")
        )
        assert [part.title for part in scores.parts] == ["ROC curve", "Calibration", "Lift"]
        lift, importance = scores.parts[2], columns.parts[0]
        assert isinstance(lift, Bars) and isinstance(importance, Bars)
        assert lift.values[0] > 1.5 > 0.5 > lift.values[-1]
        assert importance.names == ["c"] and importance.values[0] > 0.2
        assert isinstance(columns.parts[1], Table)
        assert columns.parts[1].rows == [("c", 4, 3, "75.0%", None, columns.parts[1].rows[0][-1])]
    if told:
        assert "another run.path" in found.pop()
    assert len(found) == len(told), found
    for line, beginning in zip(found, told, strict=True):
        assert line.startswith(beginning)
