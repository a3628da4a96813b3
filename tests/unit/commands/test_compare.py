from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from embedtrain.commands.compare import FACTORS, Comparison, parse_rates
from embedtrain.errors import UserError

pytest.importorskip("matplotlib", reason="the comparison's plot needs the extra `plots`")

CONFIG = "configs/word2vec.yaml"
TEXT = ["data.path=corpus.txt"]


def compare(folder: Path, names: list[str], rates: dict[str, list[float]], *overrides: str) -> Comparison:
    return Comparison(CONFIG, [*TEXT, *overrides], names, rates, str(folder))


def write_metrics(comparison: Comparison, losses: dict[tuple[str, float], list[float | None]]) -> None:
    for config in comparison.configs:
        path = Path(config.run.path)
        path.mkdir(parents=True)
        lines = [
            json.dumps({"step": 10 * (n + 1), "seconds": 0.5 * (n + 1), "loss": loss, "similarity": 0.1 * n})
            for n, loss in enumerate(losses[config.optimizer.name, config.optimizer.lr])
        ]
        (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_every_optimizer_has_a_grid_and_all_else_is_the_same(tmp_path: Path) -> None:
    comparison = compare(tmp_path, ["rowwise_adagrad", "sgd"], {"sgd": [0.1, 0.01]})
    tried = [(config.optimizer.name, config.optimizer.lr) for config in comparison.configs]
    assert tried == [*(("rowwise_adagrad", pytest.approx(0.7 * f)) for f in FACTORS), ("sgd", 0.01), ("sgd", 0.1)]
    assert len({config.seed for config in comparison.configs}) == 1
    assert len({config.run.path for config in comparison.configs}) == len(tried)


def test_the_best_rate_of_each_is_shown_in_table_csv_and_plot(tmp_path: Path) -> None:
    comparison = compare(tmp_path, ["adam", "sgd"], {"adam": [0.01, 0.1, 1.0], "sgd": [1.0, 2.0, 3.0]})
    write_metrics(
        comparison,
        {
            ("adam", 0.01): [4.0, 3.0],
            ("adam", 0.1): [3.0, 2.0],
            ("adam", 1.0): [1.0, None],  # diverged after a good beginning
            ("sgd", 1.0): [4.0, 3.5],
            ("sgd", 2.0): [4.0, 3.4],
            ("sgd", 3.0): [4.0, 3.3],
        },
    )
    shown = comparison.finish()
    assert "| adam | 0.01, 0.1, 1 | 0.1 | 2 | 1 |" in shown
    assert "| sgd | 1, 2, 3 | 3 (at the edge of its grid) | 3.3 | 1 |" in shown
    rows = list(csv.DictReader((tmp_path / "comparison.csv").open()))
    assert len(rows) == 12
    assert {(row["optimizer"], row["lr"]) for row in rows if row["is_best"] == "1"} == {("adam", "0.1"), ("sgd", "3.0")}
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_rates_can_be_chosen_by_a_measure(tmp_path: Path) -> None:
    options = ["checkpoint.best_metric=similarity", "checkpoint.best_mode=max"]
    comparison = compare(tmp_path, ["sgd"], {"sgd": [1.0]}, *options)
    write_metrics(comparison, {("sgd", 1.0): [4.0, 3.5]})
    assert "| sgd | 1 | 1 | 3.5 | 0.1 | 1 |" in comparison.finish()


@pytest.mark.parametrize(
    ("names", "rates", "overrides", "message"),
    [
        (["sdg"], {}, [], "there is no optimizer sdg; there are rowwise_adagrad"),
        ([], {}, [], "must name at least one optimizer"),
        (["sgd"], {"adam": [0.1]}, [], "--rates gives rates of adam, which --optimizers does not name"),
        (["sgd"], {}, ["optimizer.lr=0.1"], "compare sets optimizer.lr of each run itself"),
        (["sgd"], {}, ["optimizer.eps=0.1"], "sgd has no option eps"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(
    names: list[str], rates: dict, overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        compare(tmp_path, names, rates, *overrides)


def test_standard_input_comes_once(tmp_path: Path) -> None:
    overrides = ["model=ranking", "data.path=-", "data.categorical=[user]", "train.epochs=1", "schedule.name=constant"]
    with pytest.raises(UserError, match=r"data\.path=- can be read only once"):
        Comparison(None, overrides, ["sgd"], {}, str(tmp_path))


def test_tables_keep_the_optimizers_that_they_name(tmp_path: Path) -> None:
    comparison = compare(tmp_path, ["adagrad", "sgd"], {}, "optimizer.tables.output={name: adam, lr: 0.02}")
    assert {(c.optimizer.of_table("output").name, c.optimizer.of_table("output").lr) for c in comparison.configs} == {
        ("adam", 0.02)
    }
    assert {config.optimizer.of_table("input").name for config in comparison.configs} == {"adagrad", "sgd"}


def test_rates_are_read_from_the_command_line() -> None:
    assert parse_rates(["adam=0.001,0.01", "sgd=1"]) == {"adam": [0.001, 0.01], "sgd": [1.0]}
    with pytest.raises(UserError, match="got 'adam'"):
        parse_rates(["adam"])
