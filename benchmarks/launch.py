"""Starts a benchmark on two ranks of this machine, one thread each."""

from __future__ import annotations

import os
import subprocess
import sys

RANKS = 2


def is_rank() -> bool:
    """Returns whether this process is one of the ranks."""
    return "RANK" in os.environ


def run_ranks() -> int:
    """Runs this program again, on the ranks, and returns its exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", *sys.argv]
    return subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False).returncode
