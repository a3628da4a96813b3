"""The profile of a run's steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from embedtrain.distributed.stages import stage
from embedtrain.train.profile import StepProfile
from embedtrain.train.run import _profile
from embedtrain.train.run_folder import RunFolder


def test_the_trace_and_the_table_name_the_stages() -> None:
    written: list[tuple[bytes, str]] = []
    with StepProfile(lambda trace, table: written.append((trace, table)), warmup_steps=1, num_steps=2) as profile:
        for _ in range(5):
            with stage("kernel"):
                torch.ones(10).sum()
            profile.step()
    ((trace, table),) = written
    assert "embedtrain: kernel" in {event.get("name") for event in json.loads(trace)["traceEvents"]}
    assert table.startswith("2 steps")
    assert "kernel" in table


def test_a_run_that_ends_early_is_written_too() -> None:
    written: list[str] = []
    with StepProfile(lambda trace, table: written.append(table), warmup_steps=1, num_steps=50) as profile:
        for _ in range(3):
            profile.step()
    assert written[0].startswith("2 steps")


def test_without_a_step_after_the_warm_up_a_warning_replaces_the_profile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    for num_steps in (3, 10):
        caplog.clear()
        with _profile(folder, 0) as profile:
            for _ in range(num_steps):
                profile.step()
        assert "no profile was written: the first 10 steps are not profiled" in caplog.text
    assert not (tmp_path / "run").exists()
