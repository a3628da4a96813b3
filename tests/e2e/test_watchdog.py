"""A rank that hangs shows where, and ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import time
from embedtrain.train import watchdog
watchdog._GRACE_SECONDS = 0.0
with watchdog.Watchdog(0.3) as dog:
    for _ in range(10):
        time.sleep(0.1)
        dog.alive()
print("left", flush=True)
with watchdog.Watchdog(0.3) as dog:
    time.sleep(60)
"""


@pytest.mark.serial
def test_it_ends_a_process_that_hangs_and_prints_its_stacks() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    assert done.stdout == "left\n"
    assert done.returncode == 1
    assert "Timeout" in done.stderr and 'File "<string>", line 11' in done.stderr
