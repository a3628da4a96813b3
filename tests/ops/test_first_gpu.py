"""benchmarks/first_gpu.sh: its parts run on a CPU, and one that fails does not end the others."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "first_gpu.sh"
NUM_PARTS = 9


def run(folder: Path, *arguments: str, python: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "TEST_WORKERS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run([PROGRAM, *arguments, folder], env=environment, capture_output=True, text=True, timeout=900)


def test_without_a_gpu_it_says_so_and_does_nothing(tmp_path: Path) -> None:
    done = run(tmp_path / "results", python="false")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "needs a CUDA GPU" in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_part_that_fails_is_counted_and_the_next_one_begins(tmp_path: Path) -> None:
    done = run(tmp_path / "results", "--rehearse", python="false")
    summary = (tmp_path / "results" / "summary.txt").read_text().splitlines()
    assert [line[0] for line in summary] == [str(number) for number in range(NUM_PARTS)]
    failed = [line for line in summary if "FAILED with exit status 1" in line]
    assert len(failed) == done.returncode == NUM_PARTS - 1
    assert "left out: it lacks what it needs" in summary[2]
    results = (tmp_path / "results" / "results.txt").read_text()
    assert "pytest-xdist, hypothesis or psutil is not installed" in results
    assert all(line in results for line in summary)


def test_what_a_machine_lacks_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(PROGRAM.parent)
    import carried

    monkeypatch.setattr(carried, "WHEELS", tmp_path)
    for name in ("NumPy", "a_package"):
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name.lower()}/__init__.py", "")
    assert carried.unpack(tmp_path / "there") == ["a_package"]
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["a_package"]


def test_a_case_that_fails_does_not_end_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(PROGRAM.parent)
    import gpu

    attempts, done = gpu.Attempts(), []
    for case in ("first", "second", "third"):
        with attempts.at(case):
            assert case != "second"
            done.append(case)
    assert done == ["first", "third"]
    assert "FAILED: second" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"FAILED: second$"):
        attempts.end()


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the rehearsal is for machines without one")
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    done = run(tmp_path / "results", "--rehearse", python=sys.executable)
    results = (tmp_path / "results" / "results.txt").read_text()
    assert done.returncode == 0, results[-4000:]
    for told in (
        "| ranking, dcn_v2 |",
        "tests/gpu/test_ops.py",
        "compute-sanitizer is not on",
        "| gather_rows, dim 100",
    ):
        assert told in results, told
    assert results.count("| yes |") == 4
    assert "Traceback" not in results
