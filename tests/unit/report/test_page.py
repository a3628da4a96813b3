from __future__ import annotations

import dataclasses
import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from embedtrain.cli import main
from embedtrain.metrics.figures import Bars, Chart, Line, PointMap, Section, Table, Text
from embedtrain.report.comparison import comparison_page
from embedtrain.report.curves import (
    MAX_POINTS,
    charts_of,
    read_curves,
    thinned,
    without_partial,
)
from embedtrain.report.facts import RunFacts, read_facts
from embedtrain.report.headline import cards_of
from embedtrain.report.page import Page, alternative_text, render
from embedtrain.report.writing import run_page
from embedtrain.train.run_folder import RunFolder
from tests.unit.report.made import made_facts

RECORDS: list[dict[str, Any]] = [
    {
        "step": 10,
        "epoch": 0.5,
        "loss": 0.6,
        "auc": 0.7,
        "examples": 100,
        "examples_per_second": 9.0,
        "ids/distinct": 50.0,
    },
    {
        "step": 20,
        "epoch": 1.0,
        "loss": 0.5,
        "auc": 0.8,
        "examples": 200,
        "examples_per_second": 9.5,
        "ids/distinct": 7.0,
    },
    {"step": 20, "epoch": 1.0, "valid_log_loss": 0.55, "valid_auc": 0.75, "rmse": 1.5},
    {
        "step": 30,
        "epoch": 1.5,
        "loss": 0.4,
        "auc": 0.9,
        "examples": 300,
        "examples_per_second": 9.0,
        "ids/distinct": 50.0,
    },
    {
        "step": 33,
        "epoch": 1.65,
        "loss": 9.9,
        "auc": 0.1,
        "examples": 333,
        "examples_per_second": 1.0,
        "ids/distinct": 50.0,
    },
    {"step": 33, "epoch": 1.65, "valid_log_loss": 0.56, "valid_auc": 0.74, "rmse": 1.4},
]
LOGGED = read_curves(RECORDS)
HOSTILE = "</script><img src=x onerror=alert(1)>\x1b[31m&"


def facts(**changes: Any) -> RunFacts:
    starts = [{"time": "2026-01-02T03:04:05+00:00", "command": "embedtrain train x", "commit": "abc123"}]
    return made_facts(**{"logged": LOGGED, "starts": starts, **changes})


class Shown(HTMLParser):
    """The tags of a page, and its texts outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts = ""
        self.scripts = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("script", "style"):
            self.scripts += data
        else:
            self.texts += data


def drawn_in(page: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(re.findall(r'id="drawn">(.*?)</script>', page, re.DOTALL)[0])
    return found


def test_training_and_validation_stand_in_one_chart_and_the_loss_comes_first() -> None:
    groups = charts_of({"x": LOGGED})
    lines = {chart.title: [line.name for line in chart.lines] for chart in groups.quality}
    assert lines == {"loss": ["training", "validation"], "AUC": ["training", "validation"], "RMSE": ["held-out data"]}
    assert [line.is_dashed for line in groups.quality[0].lines] == [True, False]
    assert [chart.title for chart in groups.progress] == ["examples per second"]
    assert [chart.title for chart in groups.plumbing] == ["ids/distinct"]


def test_a_partial_last_record_is_no_cliff_and_a_small_last_step_of_an_epoch_no_dip() -> None:
    kept = without_partial(LOGGED)
    assert list(map(list, kept["loss"])) == [[10, 20, 30], [0.6, 0.5, 0.4]]
    assert list(map(list, kept["ids/distinct"])) == [[10, 30], [50.0, 50.0]]
    assert list(kept["valid_auc"][0]) == [20, 33]
    even = read_curves([{"step": step, "loss": 1.0} for step in (10, 20, 30)])
    assert without_partial(even) == even.curves


def test_numbers_that_no_chart_can_show_are_left_out() -> None:
    records = [{"step": 1, "loss": 10**400, "a": "x", "b": None, "c": float("nan")}, {"step": 7, "loss": 2}]
    logged = read_curves(records)
    assert {name: list(values) for name, (_, values) in logged.curves.items()} == {"loss": [2.0]}
    assert logged.last_step == 7


def test_a_long_run_takes_little_memory(tmp_path: Path) -> None:
    record = {f"m{number}": 0.25 for number in range(20)}
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(1, 5001):
            file.write(json.dumps({"step": step, "loss": 1 / step, **record}) + "\n")
    tracemalloc.start()
    logged = read_curves(RunFolder(str(tmp_path)).read_metrics())
    charts_of({"x": logged})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(logged.curves["loss"][0]) == 5000
    assert peak < 3 * 5000 * 21 * 16, "more than three times the bytes of the numbers"


def test_many_points_are_thinned_and_their_extremes_stay() -> None:
    values = [0.0] * 300_000
    values[123_456], values[7] = 5.0, -3.0
    steps, kept = thinned(range(300_000), values)
    assert len(steps) <= MAX_POINTS + 2
    assert (max(kept), min(kept), steps[0], steps[-1]) == (5.0, -3.0, 0, 299_999)
    assert steps == sorted(steps)


def test_the_headline_is_quality_and_tells_the_best() -> None:
    cards = {card.name: (card.value, card.detail) for card in cards_of(LOGGED, {}, {"analogies": 0.5})}
    assert list(cards)[:2] == ["validation log loss", "validation AUC"]
    assert cards["validation AUC"] == ("0.74", "best 0.75 at step 20, training 0.1")
    assert cards["analogies"] == ("0.5", "")
    judged = cards_of(LOGGED, {"checkpoint": {"best_metric": "rmse", "best_mode": "min"}}, {})
    assert (judged[0].name, judged[0].detail) == ("RMSE", "its best")


def test_the_page_of_an_unknown_recipe_tells_the_run() -> None:
    shown = Shown(render(run_page(facts(logged=read_curves(RECORDS[:1])))))
    for text in (
        "done at step 1,200, 2 ranks",
        "What to try next",
        "not known",
        "seed: 1",
        "embedtrain train x",
        "abc123",
    ):
        assert text in " ".join(shown.texts.split())


@pytest.mark.parametrize("part", [
    Chart(HOSTILE, [Line(HOSTILE, [1, 2], [1.0, 2.0])], HOSTILE, HOSTILE, HOSTILE),
    Bars(HOSTILE, [HOSTILE], [1.0], HOSTILE, HOSTILE, HOSTILE, details=[HOSTILE]),
    Table(HOSTILE, (HOSTILE, HOSTILE), [(HOSTILE, HOSTILE)], HOSTILE),
    PointMap(HOSTILE, [HOSTILE], [0.0], [0.0], HOSTILE, HOSTILE, HOSTILE),
    Text(HOSTILE, HOSTILE),
], ids=lambda part: type(part).__name__)  # fmt: skip
def test_texts_of_a_user_are_shown_and_do_nothing(part: Any) -> None:
    section = Section(HOSTILE, [part], HOSTILE)
    page = render(Page(HOSTILE, HOSTILE, HOSTILE, sections=[section], folded=[section], advice=[HOSTILE]))
    shown = Shown(page)
    assert "img" not in shown.tags
    assert shown.tags.count("script") == 3
    assert "\x1b" not in page
    assert shown.texts.count("onerror=alert(1)>\\x1b[31m&") >= 8
    if isinstance(part, Chart):
        assert drawn_in(page)[0]["lines"][0]["name"] == HOSTILE.replace("\x1b", "\\x1b")
    if isinstance(part, PointMap):
        assert drawn_in(page)[0]["names"] == [HOSTILE.replace("\x1b", "\\x1b")]


def test_the_page_needs_no_other_file() -> None:
    page = render(run_page(facts()))
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", page)
    assert "default-src 'none'" in page
    assert len(page) < 200_000
    assert "The MIT License" in (Path(render.__code__.co_filename).parent / "uplot" / "LICENSE").read_text()


def test_lines_of_a_chart_share_one_axis() -> None:
    chart = Chart("c", [Line("a", [1, 3], [0.5, 0.1234567]), Line("b", [2], [float("nan")])])
    drawn = drawn_in(render(Page("t", "s", sections=[Section("x", [chart])])))[0]
    assert (drawn["x"], drawn["values"]) == ([1, 2, 3], [[0.5, None, 0.123457], [None, None, None]])


def test_a_line_that_rises_straight_up_keeps_its_points() -> None:
    chart = Chart("ROC", [Line("model", [0.0, 0.0, 1.0], [0.0, 0.5, 1.0]), Line("chance", [0.0, 1.0], [0.0, 1.0])])
    drawn = drawn_in(render(Page("t", "s", sections=[Section("x", [chart])])))[0]
    assert (drawn["x"], drawn["values"]) == ([0, 0, 1], [[0, 0.5, 1], [0, None, 1]])


def test_more_measures_than_cards_are_all_shown() -> None:
    extra = {f"measure {number}": 0.5 for number in range(8)}
    assert [card.name for card in cards_of(LOGGED, {}, extra)] == list(extra)


def test_no_secret_is_on_a_page() -> None:
    config = "data: {path: ftp://user:pass1@host/x}\nlog:\n  token: my pass2 is long\n  other: null\n"
    known = facts(
        path="s3://user:pass3@bucket/run", config=config, starts=[{"command": "embedtrain train a=ftp://u:pass4@b"}]
    )
    other = facts(path="s3://user:pass5@bucket/other/run", config=config.replace("pass", "pass6"))
    for page in (render(run_page(known)), render(comparison_page([known, other]))):
        assert "pass" not in Shown(page).texts and "is long" not in Shown(page).texts
        assert "user@" in page


def test_every_chart_is_told_in_words() -> None:
    told = alternative_text(Chart("loss", [Line("training", [1, 2, 3], [3.0, 1.0, 2.0])], "step"))
    assert told == "Line chart of loss by step: training from 3 to 2, lowest 1, highest 3."
    page = render(run_page(facts()))
    assert page.count('role="img"') == page.count("data-drawn=") == len(drawn_in(page)) > 3
    assert page.count('role="img" aria-label="Line chart of') == len(drawn_in(page))


def test_runs_are_compared() -> None:
    other = facts(
        path="runs/y",
        config="seed: 2\n",
        logged=dataclasses.replace(read_curves(RECORDS[:3]), evaluated=LOGGED.evaluated),
    )
    page = comparison_page([facts(), other])
    assert [card.value for card in page.cards] == ["0.56", "0.55"]
    measures, quality, differing, *_ = page.sections
    table = measures.parts[0]
    assert isinstance(table, Table)
    assert list(table.rows[0]) == ["validation log loss", "0.56", "0.55 ★"]
    assert list(table.rows[1]) == ["validation AUC", "0.74", "0.75 ★"]
    chart = quality.parts[0]
    assert isinstance(chart, Chart)
    assert [(line.name, line.color) for line in chart.lines] == [
        ("<x>, training", 0), ("<x>, validation", 0), ("y, training", 1),
    ]  # fmt: skip
    assert isinstance(differing.parts[0], Table) and differing.parts[0].rows == [("seed", "1", "2")]
    render(page)


def test_a_run_without_a_checkpoint_has_a_page_and_no_run_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run/config.yaml").write_text("model: word2vec\nrun: {path: run}\ndata: {path: x.txt}\n")
    Path("run/metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    assert main(["report", "run"]) == 0
    page = Shown(Path("run/report.html").read_text()).texts
    assert "not finished at step 33, 1.65 epochs" in page and "There is no checkpoint yet" in page
    assert len(read_facts("run").curves["loss"][0]) == 4
    assert main(["report", "run", "elsewhere"]) == 2
    assert main(["report", "run", "run/"]) == 2
    assert main(["report", "run", "elsewhere", "--word", "a"]) == 2
    errors = capsys.readouterr().err
    for told in ("no run folder at 'elsewhere'", "a run is named twice", "--word: only for one run, and there are 2"):
        assert told in errors
