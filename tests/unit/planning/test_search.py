"""What is searched is read from lists and ranges; a search that was killed goes on with the trial that it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embedtrain.errors import UserError
from embedtrain.planning.search import JOURNAL_NAME, Choices, Range, Search, read_space

pytest.importorskip("optuna", reason="a search needs the extra `tune`")


@pytest.mark.parametrize(
    ("declared", "read"),
    [
        ("0.03:0.3:log", Range(0.03, 0.3, is_log=True)),
        ("1:8", Range(1, 8, is_whole=True)),
        ({"low": 0.5, "high": 2}, Range(0.5, 2)),
        ({"low": "1e-4", "high": 1, "log": True}, Range(1e-4, 1, is_log=True)),
        ("1,2,4", Choices(["1", "2", "4"])),
        ("adam", Choices(["adam"])),
        ([64, None, True, [1, 2], "dot"], Choices(["64", "null", "true", "[1, 2]", "dot"])),
    ],
)
def test_lists_and_ranges_are_read(declared: Any, read: Choices | Range) -> None:
    assert read_space({"optimizer.lr": declared}, "tune") == {"optimizer.lr": read}


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("1:low", r"tune: optimizer\.lr: expected two numbers, got '1' and 'low'"),
        ("2:1", r"tune: optimizer\.lr: expected a range from a number to a larger one, got 2 to 1"),
        ("0:1:log", r"a larger one, both above 0, got 0 to 1"),
        ({"low": 1}, r"tune: optimizer\.lr: expected a list of values, or a range such as"),
        ({"low": 1, "high": 2, "log": "yes"}, r"expected log: true or log: false, got 'yes'"),
        ("1,,2", r"expected a list of values"),
        ([], r"expected a list of values"),
        (0.1, r"expected a list of values"),
    ],
)
def test_anything_else_is_refused(declared: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_space({"optimizer.lr": declared}, "tune")


COMMON = {"judged_by": "the largest recall@20", "is_largest_best": True, "seed": 1}


def search(folder: Path, **options: Any) -> Search:
    space = read_space({"optimizer.lr": "0.01:1:log", "table.dim": "8,16"}, "tune")
    start = {"optimizer.lr": 0.1, "table.dim": 16}
    return Search(str(folder), **{**COMMON, "space": space, "start": start, **options})


def test_the_first_trial_is_the_configuration_itself(tmp_path: Path) -> None:
    assert search(tmp_path).next().settings == ["optimizer.lr=0.1", "table.dim=16"]


def test_a_start_outside_the_space_is_drawn(tmp_path: Path) -> None:
    settings = search(tmp_path, start={"optimizer.lr": 7.0, "table.dim": 32}).next().settings
    assert 0.01 <= float(settings[0].partition("=")[2]) <= 1
    assert settings[1] in ("table.dim=8", "table.dim=16")


def test_the_first_trial_keeps_null_and_later_ones_draw(tmp_path: Path) -> None:
    start = {"optimizer.lr": None, "table.dim": 16}
    asked = search(tmp_path, start=start)
    first = asked.next()
    assert first.settings == ["optimizer.lr=null", "table.dim=16"]
    assert search(tmp_path, start=start).next() == first
    asked.finish(first.number, "complete", (0.9, 3.0), 1.0)
    for _ in range(3):
        later = asked.next()
        assert later.settings[0] != first.settings[0]
        asked.finish(later.number, "complete", (0.5, 3.0), 1.0)
    best = asked.best()
    assert best is not None and best.settings == first.settings


def test_a_killed_search_goes_on_where_it_was(tmp_path: Path) -> None:
    first = search(tmp_path)
    first.finish(first.next().number, "complete", (0.5, 3.0), 7.0)
    left = first.next()
    first.report(left.number, 0.5, 0.2)
    again = search(tmp_path)
    assert [trial.best for trial in again.trials()] == [0.5]
    assert again.next() == left
    again.report(left.number, 0.5, 0.2)
    again.finish(left.number, "complete", (0.6, 2.0), 8.0)
    assert again.next().settings not in ([*left.settings], [*first.trials()[0].settings])
    best = again.best()
    assert best is not None
    assert (best.number, best.best, best.epoch, best.seconds) == (left.number, 0.6, 2.0, 8.0)
    assert best.settings == left.settings
    with pytest.raises(UserError, match=r"holds a search of other settings"):
        search(tmp_path, space=read_space({"table.dim": "8,16"}, "tune"))


def test_what_a_killed_job_left_half_done_is_cleared(tmp_path: Path) -> None:
    first = search(tmp_path)
    first.finish(first.next().number, "complete", (0.5, 3.0), 7.0)
    journal = tmp_path / JOURNAL_NAME
    with journal.open("ab") as file:
        file.write(b'{"op_code":6,"worker_id":"4')
    # Optuna's lock, whose target is a path relative to where the job was started.
    (tmp_path / f"{JOURNAL_NAME}.lock").symlink_to("nowhere")
    again = search(tmp_path)
    assert [trial.best for trial in again.trials()] == [0.5]
    again.finish(again.next().number, "complete", (0.6, 3.0), 7.0)
    assert [trial.best for trial in search(tmp_path).trials()] == [0.5, 0.6]


def test_measurements_of_another_measure_are_not_compared(tmp_path: Path) -> None:
    search(tmp_path)
    with pytest.raises(UserError, match="judges trials by the largest recall@20, not by the smallest loss"):
        search(tmp_path, judged_by="the smallest loss")


def test_a_refused_trial_is_never_the_best(tmp_path: Path) -> None:
    first = search(tmp_path)
    first.finish(first.next().number, "refused", None, 0.0)
    assert [trial.outcome for trial in first.trials()] == ["refused"]
    assert first.best() is None


def test_a_trial_that_is_behind_is_not_gone_on_with(tmp_path: Path) -> None:
    trials = search(tmp_path)
    for value in (0.5, 0.6, 0.7):
        good = trials.next()
        trials.report(good.number, 0.2, value)
        trials.finish(good.number, "complete", (value, 1.0), 1.0)
    bad = trials.next()
    assert trials.report(bad.number, 0.2, 0.1)
    trials.finish(bad.number, "stopped", (0.9, 1.0), 1.0)
    best = trials.best()
    assert best is not None
    assert best.best == 0.7  # of complete trials
    slow = trials.next()
    trials.report(slow.number, 0.2, 0.9)
    assert not trials.report(slow.number, 0.995, 0.1)  # it has run anyway


def test_a_smallest_best_is_found_too(tmp_path: Path) -> None:
    trials = search(tmp_path, is_largest_best=False)
    for value in (0.5, 0.3, 0.7):
        trials.finish(trials.next().number, "complete", (value, 1.0), 1.0)
    trials.finish(trials.next().number, "failed", None, 1.0)
    best = trials.best()
    assert best is not None
    assert best.best == 0.3
