"""Triton's compiler takes every kernel that its interpreter took, for cards that this machine may not have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "embedtrain" / "ops"


def test_every_kernel_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    program = [sys.executable, Path(__file__).with_name("compile_kernels.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    # A kernel is a decorated function that is launched over a grid; the others are its parts.
    lines = [line.strip() for path in FOLDER.glob("*/triton.py") for line in path.read_text().splitlines()]
    launched = [line.partition("[")[0] for line in lines if "[(" in line]
    kernels = {name for name in launched if name.startswith("_") and name.isidentifier()}
    assert kernels and not [name for name in kernels if name not in done.stdout]
