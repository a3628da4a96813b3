"""Triton's compiler takes every kernel that its interpreter took, within a budget, for cards that need not be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tests.ops.compile_kernels import BUDGET, Code, excesses

FOLDER = Path(__file__).parents[2] / "embedtrain" / "ops"
SHARED_BYTES = 99 << 10
"""What a program may have on the cards that have least."""


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(["--dims", "100", "--architectures", "90"], id="one width"),
        pytest.param(["--dims", "32,64,100,128,256"], id="all", marks=[pytest.mark.slow, pytest.mark.timeout(1500)]),
    ],
)
def test_every_kernel_stays_within_its_budget(tmp_path: Path, options: list[str]) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(FOLDER.parents[1])}
    environment.pop("TRITON_INTERPRET", None)
    program = [sys.executable, Path(__file__).with_name("compile_kernels.py"), *options]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    # A kernel is a decorated function that is launched over a grid; the others are its parts.
    lines = [line.strip() for path in FOLDER.rglob("triton*.py") for line in path.read_text().splitlines()]
    launched = [line.partition("[")[0] for line in lines if "[(" in line]
    kernels = {name for name in launched if name.startswith("_") and name.isidentifier()}
    assert len(kernels) == 7
    assert not [name for name in kernels if name not in done.stdout]


def test_what_the_budget_allows() -> None:
    for name, budget in json.loads(BUDGET.read_text()).items():
        assert budget["num_atomics"] == 0, name
        # On sm_80 the assembler rounds the registers of this one down and puts two to four numbers aside.
        is_squeezed = name.startswith("_update_tile adagrad") and name.endswith("bfloat16 sm_80")
        assert budget["spilled_bytes"] <= (16 if is_squeezed else 0), name
        assert budget["shared_bytes"] <= SHARED_BYTES, name
        # A warp reads a row of 32 or 64 columns in one access of fewer bytes per thread.
        is_narrow = name.startswith("_sum_chunk") and ("dim 32" in name or "dim 64" in name)
        assert budget["row_bytes"] == 16 or "bfloat16" in name or is_narrow, name
        assert (budget["num_products"] > 0) == name.startswith("_block"), name


def test_an_excess_is_named() -> None:
    allowed = {"registers": 40, "spilled_bytes": 0, "shared_bytes": 0, "row_bytes": 16, "num_products": 0}
    found = excesses("kernel", Code(41, 8, 0, 4, 0, 0), {**allowed, "num_atomics": 0})
    assert found == [
        "kernel: registers 41, at most 40 expected",
        "kernel: spilled_bytes 8, at most 0 expected",
        "kernel: row_bytes 4, at least 16 expected",
    ]
