"""The cases of benchmarks/gpu.py run, and check their results, on CPU tensors too."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROGRAM = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def test_every_case_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PROGRAM)
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "WORDS_PER_STEP", 300)
    monkeypatch.setattr(benchmark, "VOCABULARY", 50)
    names = []
    for case in benchmark.cases(500, 200, torch.device("cpu")):
        case.check()
        case.run(benchmark.NUM_SETS - 1)
        names.append(case.name)
    assert len(names) == len(set(names)) > 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the benchmark would run")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, PROGRAM], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs a CUDA GPU" in done.stderr and "Traceback" not in done.stderr
