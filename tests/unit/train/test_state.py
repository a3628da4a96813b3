"""The state of a run in a checkpoint is checked as a whole before any command uses it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from embedtrain.checkpoint import Manifest
from embedtrain.errors import CorruptCheckpointError
from embedtrain.train.state import TrainState, read_run_state

STATE: dict[str, Any] = {
    "train": TrainState(step=5).as_json(),
    "optimizer": {"name": "Adam", "param_groups": [{"step": 5, "lr": 0.1, "tables": ["t"]}], "num_skipped": 0},
    "data_fingerprint": "x",
    "metrics": {"loss": 0.5, "note": "text"},
    "init_from": {"t": {"path": "a.txt", "num_copied": 1, "num_rows": 2}},
    "grown_from": {"path": "old", "step": 3},
    "export_table": "t",
}


def manifest_of(state: dict[str, Any]) -> Manifest:
    return Manifest(5, "", {}, 1, {}, None, {}, state)


def test_a_state_is_read_with_what_an_earlier_version_left_out() -> None:
    state = copy.deepcopy(STATE)
    del state["train"]["window"]
    found = read_run_state(manifest_of(state), "c")
    assert found.train == TrainState(step=5)
    assert found.optimizer.param_groups[0]["lr"] == 0.1
    assert found.init_from["t"].num_rows == 2


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: s.pop("train"), "train is missing"),
        (lambda s: s.update(train=[]), "train: expected"),
        (lambda s: s["train"].update(step="5"), "train.step: expected a valid integer, found '5'"),
        (lambda s: s["train"].update(step=6), "step 5 holds the counters of step 6"),
        (lambda s: s["train"].update(seconds=-1.0), "train.seconds: .*, found -1.0"),
        (
            lambda s: s["train"].update(window={"sums": ["x"]}),
            r"train.window.sums\[0\]: expected a valid number, found 'x'",
        ),
        (lambda s: s.pop("optimizer"), "optimizer is missing"),
        (lambda s: s["optimizer"].update(param_groups=[]), "optimizer.param_groups: .* at least 1 item"),
        (lambda s: s["optimizer"].update(param_groups=[{}]), r"optimizer.param_groups\[0\]: expected step is missing"),
        (lambda s: s["optimizer"].update(num_skipped="\x1b[2J"), r"optimizer.num_skipped: .*, found '\\x1b\[2J'"),
        (lambda s: s.pop("data_fingerprint"), "data_fingerprint is missing"),
        (lambda s: s.update(data_fingerprint=7), "data_fingerprint: expected a valid string, found 7"),
        (lambda s: s.update(export_table=["t"]), r"export_table: expected a valid string, found \['t'\]"),
        (lambda s: s.update(metrics={"loss": []}), "metrics"),
        (lambda s: s.update(init_from={"t": {}}), "init_from.t.path is missing"),
        (lambda s: s.update(grown_from="x"), "grown_from: expected"),
    ],
)
def test_a_state_that_no_trainer_saved_is_refused(change: Callable[[dict[str, Any]], object], fault: str) -> None:
    state = copy.deepcopy(STATE)
    change(state)
    with pytest.raises(CorruptCheckpointError, match=rf"c/manifest\.json: .*{fault}"):
        read_run_state(manifest_of(state), "c")
