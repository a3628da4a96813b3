"""`tune` and `baseline` on small data: what they find, write and refuse."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from embedtrain.cli import main
from embedtrain.commands import job
from embedtrain.commands import tune as command
from embedtrain.distributed.ranks import OneProcess
from embedtrain.errors import UserError
from embedtrain.planning.search import Search
from embedtrain.recipes.loading import load_config
from embedtrain.recipes.retrieval.config import RetrievalConfig
from embedtrain.train.lock import RunLock

pytest.importorskip("optuna", reason="a search needs the extra `tune`")

DATA = [
    "data.path=events.csv",
    "data.cache_path=cache",
    "data.split=leave_one_out",
    "data.time_column=time",
]
SMALL = [
    "table.dim=4",
    "train={epochs: 2, global_batch_size: 12}",
    "evaluate.k=[5]",
    "log={tensorboard: false, rows_every_steps: null}",
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    lines = [
        f"u{user},g{user % 3}-i{item},{time}"
        for user in range(24)
        for time, item in enumerate(generator.permutation(9)[:6])
    ]
    Path("events.csv").write_text("\n".join(["user,item,time", *lines]) + "\n")
    Path("my.yaml").write_text("model: retrieval\ntune:\n  optimizer.lr: {low: 0.05, high: 0.2, log: true}\n")


def ask(capfd: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    capfd.readouterr()
    found = main(list(arguments))
    captured = capfd.readouterr()
    assert found == status, captured.err
    return captured.out if status == 0 else captured.err


@pytest.mark.slow  # test_search.py resumes a search without training
def test_a_search_names_the_best_settings_and_goes_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["tune", "my.yaml", *DATA, *SMALL, "--output", "search"]
    killed: list[int] = []

    def strike(self: Search, number: int, share: float, value: float) -> bool:
        killed.append(number)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Search, "report", strike)
        assert main([*arguments, "--trials", "2"]) == 130
    assert killed == [0]
    said = ask(capfd, *arguments, "--trials", "2")
    assert re.search(r"2 trials, the best by ndcg@5 on validation data: trial \d, 0\.\d+ at epoch [12]", said)
    assert re.search(
        r"its settings: +optimizer\.lr=\S+ train\.epochs=(1 schedule\.epochs=2|2) data\.validation=none", said
    )
    assert "train with them: embedtrain train search/best.yaml" in said
    best = Path("search/best.yaml").read_text()
    assert "validation: none" in best
    assert "path: search/best" in best
    assert "tune:" not in best
    table = Path("search/trials.md").read_text().splitlines()
    assert table[0] == "| trial | ndcg@5 | epoch | outcome | seconds | optimizer.lr |"
    assert len(table) == 4
    assert "validation: auto" in Path("search/trial-0000/config.yaml").read_text()
    assert ask(capfd, *arguments, "--trials", "2") == said
    assert "search with other settings: table.dim" in ask(capfd, *arguments, "table.dim=8", "--trials", "2", status=2)
    # The final training sees the validation part too, and is measured on the test part.
    ask(capfd, "train", "search/best.yaml")
    assert "recall@5" in ask(capfd, "evaluate", "search/best")
    compared = ask(capfd, "baseline", "retrieval", *DATA, "evaluate.k=[5]", "--run", "search/best").splitlines()
    num_users = len({line.split("\t")[0] for line in Path("search/best/split/test.tsv").read_text().splitlines()[1:]})
    assert compared[0] == f"test part of {num_users} users, measured as model=retrieval"
    assert compared[1:3] == ["item-knn: neighbors 100, shrink 10, alpha 0.5", "ease: regularization 250"]
    assert compared[3].split() == ["popularity", "item-knn", "ease", "search/best"]
    assert [line.split()[0] for line in compared[4:6]] == ["recall@5", "ndcg@5"]
    # The folder of a run stands for its configuration.
    alone = ask(capfd, "baseline", "search/best", "--methods", "popularity").splitlines()
    assert alone[1].split() == ["popularity", "search/best"]
    assert alone[2].split()[1] == compared[4].split()[1]
    assert ask(capfd, "baseline", "search/best", "--methods", "popularity", "--run", "./search/best/") == "\n".join(
        [*alone, ""]
    )
    with Path("events.csv").open("a") as file:
        file.write("".join(f"u{user},i{user},9\n" for user in range(3)))
    assert "search/best was trained on other data: the files" in ask(capfd, "baseline", "search/best", status=2)
    Path("empty").mkdir()
    assert "no run folder at 'empty'" in ask(capfd, "baseline", "empty", status=2)
    Path("retrieval").mkdir()  # a shipped configuration has the same name
    assert "popularity" in ask(capfd, "baseline", "retrieval", *DATA, "evaluate.k=[5]", "--methods", "popularity")


@pytest.mark.parametrize(
    ("more", "best_epoch", "length"),
    [
        ([], 1.0, "train.epochs=1 schedule.epochs=2"),
        pytest.param([], 2.0, "train.epochs=2", marks=pytest.mark.slow),
        pytest.param(["schedule.name=constant"], 0.5, "train.epochs=1", marks=pytest.mark.slow),
        pytest.param(["schedule.epochs=8"], 2.0, "train.epochs=2 schedule.epochs=8", marks=pytest.mark.slow),
    ],
)
def test_the_last_training_has_the_rates_of_the_best_trial_and_chooses_nothing_by_the_test_part(
    more: list[str], best_epoch: float, length: str, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen_by_validation = ["train.early_stop.patience=3", "checkpoint={keep_best: 1, best_metric: 'ndcg@5'}"]
    plan = command.Plan("my.yaml", [*DATA, *SMALL, *chosen_by_validation, *more], [], "search")
    Path("search").mkdir()  # as the job's lock does
    trials = plan.trials(command.Budget(1, 60))
    trials._search.finish(trials._search.next().number, "complete", (0.5, best_epoch), 1.0)
    trials.finish()
    assert f" {length} data.validation=none" in capfd.readouterr().out
    best = load_config("search/best.yaml", [])
    assert isinstance(best, RetrievalConfig)
    assert (best.data.validation, best.data.split) == ("none", "leave_one_out")
    assert best.num_best is None
    assert (best.checkpoint.best_metric, best.evaluate.every_epochs) == ("loss", None)


def test_a_trial_is_stopped_when_its_time_is_over_or_it_is_behind() -> None:
    late = command.TrialWatch("ndcg@5", lambda epoch, value: False, deadline=time.monotonic())
    assert late.is_asked()
    assert late.reason == "out of time"
    behind = command.TrialWatch("ndcg@5", lambda epoch, value: value < 0.5, deadline=time.monotonic() + 1000)
    behind.log({"epoch": 1, "ndcg@5": 0.6})
    behind.log({"epoch": 2})
    assert not behind.is_asked()
    behind.log({"epoch": 3, "ndcg@5": 0.4})
    assert behind.is_asked()
    assert behind.reason == "stopped"


@pytest.mark.slow  # the watch is tested above without training
def test_a_search_ends_with_its_time(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["tune", "my.yaml", *DATA, *SMALL, "train.epochs=100000", "evaluate.every_epochs=1"]
    said = ask(capfd, *arguments, "log.every_steps=4", "--minutes", "0.01", "--output", "search")
    assert "1 trial, the best" in said
    table = Path("search/trials.md").read_text().splitlines()
    assert table[0] == "| trial | ndcg@5 | epoch | outcome | seconds | optimizer.lr |"
    assert "out of time" in table[2]
    assert "validation: none" in Path("search/best.yaml").read_text()
    assert "validation: auto" in Path("search/trial-0000/config.yaml").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "x"], "how long may the search take? Give --trials N, --minutes M or both"),
        (["--minutes", "-1"], "expected --minutes above 0, got -1"),
        (["--trials", "1", "--search", "optimizer.lr"], "expected --search KEY=VALUES"),
        (["--trials", "1", *["--search", "optimizer.lr=0.1,1"] * 2], "--search names a key twice"),
        pytest.param(
            ["--trials", "1", "--search", "optimizer.rate=1,2"], "no key optimizer.rate", marks=pytest.mark.slow
        ),
        (["--trials", "1", "--search", "optimizer.lr=abc,1"], "optimizer.lr: expected a number, got 'abc'"),
        pytest.param(
            ["--trials", "1", "--search", "data.split=none,ratio"],
            "tune does not search data.split",
            marks=pytest.mark.slow,
        ),
        (["--trials", "1", "run.path=x"], "leave it out; --output names their folder"),
        pytest.param(["--trials", "1", "--output", "memory://x"], "expected a local folder", marks=pytest.mark.slow),
        pytest.param(["--trials", "1", "publish.to=x"], "publish.to is for one: leave it out", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_searched_is_refused(
    capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in ask(capfd, "tune", "my.yaml", *DATA, *arguments, status=2)
    assert not Path("runs").exists()


def test_settings_that_cannot_be_used_together_are_passed_over(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "_train_one", lambda *_, watch, **__: trained.append(watch) or (0, None))
    monkeypatch.setattr(command.TunedTrials, "_best_of", lambda *_: (0.5, 1.0))
    trained: list[object] = []
    search = ["--search", "retrieval.normalize=both,none", "--search", "retrieval.loss=alignment_uniformity,softmax"]
    arguments = ["tune", "my.yaml", *DATA, *SMALL, "--output", "search", *search]
    Path("my.yaml").write_text("model: retrieval\n")
    said = ask(capfd, *arguments, "--trials", "2")
    assert "2 trials, the best" in said
    assert len(trained) == 2
    table = Path("search/trials.md").read_text()
    assert "| refused | 0 | none | alignment_uniformity |" in table
    assert len(table.splitlines()) > 4, "two lines are the heading, and refused trials are not counted"


def test_a_search_of_which_nothing_can_be_used_ends(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("no such pair")

    plan_trials = command.Plan.trials

    def trials(self: command.Plan, budget: command.Budget) -> command.TunedTrials:
        opened = plan_trials(self, budget)
        monkeypatch.setattr(command.Plan, "load", refuse)
        return opened

    monkeypatch.setattr(command.Plan, "trials", trials)
    said = ask(capfd, "tune", "my.yaml", *DATA, *SMALL, "--output", "search", "--minutes", "1", status=2)
    assert said.count("refused: no such pair") == 20
    assert "the settings of 20 trials in a row cannot be used" in said


def test_two_searches_in_one_folder_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with RunLock("search", OneProcess(), beat_seconds=0.05):
        said = ask(capfd, "tune", "my.yaml", *DATA, *SMALL, "--output", "search", "--trials", "1", status=2)
    assert "search is in use by process" in said
    assert "give this one another --output" in said


def test_a_model_without_validation_data_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    said = ask(capfd, "tune", "word2vec", "data.path=events.csv", "--trials", "1", status=2)
    assert "tune judges trials on validation data alone, and this run of model=word2vec has none" in said


@pytest.mark.slow
def test_a_section_of_a_search_must_be_a_mapping(capfd: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text("model: retrieval\ntune: [optimizer.lr]\n")
    assert "tune: expected settings with a list or a range" in ask(
        capfd, "tune", "my.yaml", *DATA, "--trials", "1", status=2
    )


def test_several_values_are_chosen_by_the_validation_part(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    several = ["--methods", "item-knn", "--neighbors", "2,5"]
    refused = ask(capfd, "baseline", "retrieval", *DATA, *several, status=2)
    assert "item-knn is given several values to choose among: give data.validation=auto" in refused
    with caplog.at_level("INFO", logger="embedtrain"):
        said = ask(capfd, "baseline", "retrieval", *DATA, "data.validation=auto", *several)
    values = {n: float(v) for n, v in re.findall(r"neighbors (\d), .*ndcg@20 (\S+) on the validation", caplog.text)}
    assert len(values) == 2
    assert f"neighbors {max(values, key=lambda n: values[n])}, shrink 10, alpha 0.5" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retrieval", "data.path=events.csv"], "nothing is held out to measure on: give evaluate.path, data.split or"),
        (["retrieval", *DATA, "--methods", "itemknn"], "--methods itemknn: there are popularity, item-knn, ease"),
        (["retrieval", *DATA, "--shrink", "x"], "--shrink: expected a number or several with commas, got 'x'"),
        (
            ["retrieval", *DATA, "--methods", "ease", "--shrink", "5"],
            "--shrink is for --methods item-knn, which is not",
        ),
        (["retrieval", *DATA, "--alpha", "1.5"], "--alpha: expected numbers from 0 to 1, got 1.5"),
        pytest.param(
            ["retrieval", *DATA, "--neighbors", "1.5"],
            "--neighbors: expected whole numbers, got 1.5",
            marks=pytest.mark.slow,
        ),
        (
            ["retrieval", *DATA, "--regularization", "0"],
            "expected numbers from 0.001 to 1e+12, got 0",
        ),
        (["word2vec", "data.path=events.csv"], "model=word2vec does not learn from interactions"),
        pytest.param(["retrieval", *DATA, "--run", "none"], "no run folder at 'none'", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_measured_is_refused(
    capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in ask(capfd, "baseline", *arguments, "data.cache_path=cache", status=2)


def test_baselines_of_sasrec_go_by_all_that_comes_before_the_test_part(capfd: pytest.CaptureFixture[str]) -> None:
    # The newest two items of each user are held out; the one before the test part alone says what follows.
    lines = [f"u{user},{item},{time}" for user in range(6) for time, item in enumerate((f"x{user}", "y", "z"))]
    lines += [f"v{user},{item},{time}" for user in range(9) for time, item in enumerate(("y", "z", f"w{user}", "q"))]
    Path("events.csv").write_text("\n".join(["user,item,time", *lines]) + "\n")
    settings = ["data.path=events.csv", "data.time_column=time", "data.cache_path=cache", "evaluate.k=[1]"]
    said = ask(capfd, "baseline", "sasrec", *settings, "--methods", "item-knn", "--shrink", "0").splitlines()
    assert said[0] == "test part of 15 users, measured as model=sasrec"
    found = dict(line.split() for line in said[3:])
    assert float(found["masked_hit@1"]) == pytest.approx(6 / 15, abs=1e-4)  # z comes after y
    assert float(found["hit@1"]) <= float(found["masked_hit@1"])


def test_ease_that_does_not_fit_is_left_out_unless_it_is_asked_for(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedtrain.planning.room.available_memory_bytes", lambda: 1000)
    said = ask(capfd, "baseline", "retrieval", *DATA)
    assert "popularity" in said
    assert "ease" not in said
    assert "EASE is left out: a matrix of all pairs of" in caplog.text
    refused = ask(capfd, "baseline", "retrieval", *DATA, "--methods", "ease", status=2)
    assert "--methods ease: a matrix of all pairs of" in refused


def test_the_last_value_of_a_key_counts_where_it_stands() -> None:
    given = ["optimizer.lr=1", "optimizer={lr: 2}", "optimizer.lr=3", "seed=4"]
    assert command._last_of_each(given) == ["optimizer={lr: 2}", "optimizer.lr=3", "seed=4"]
