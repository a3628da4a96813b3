"""A resumed run of every model logs the lines of the run that never stopped, whichever steps a record covers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.records import without_costs
from tests.unit.commands.fuzz import call
from tests.unit.commands.fuzz_files import CONFIGS, write_data


def logged(run: Path) -> list[dict[str, object]]:
    return [without_costs(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resumed_run_logs_what_the_whole_run_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    # Records are of 3 steps, checkpoints of 5: a window is open at nearly every save.
    command = ["train", f"{name}.yaml", "train.epochs=3"]
    assert call(command).status == 0
    run = tmp_path / name
    whole, text = logged(run), (run / "metrics.jsonl").read_bytes()
    assert {record["step"] for record in whole if "loss" in record} >= {3, 6}
    steps = sorted((run / "checkpoints").iterdir())
    # As after a kill: the lines of the steps after the newest checkpoint, and a last one cut short.
    for later in steps[1:]:
        shutil.rmtree(later)
    (run / "metrics.jsonl").write_bytes(text[:-7])
    resumed = call(command)
    assert resumed.status == 0, resumed.printed
    assert "resuming at step 5 of" in resumed.printed
    assert logged(run) == whole
