"""A publisher is killed at any moment: nobody sees half a version, and the next publisher misses no row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import launching
from tests.stores import redis_server

pytest.importorskip("redis", reason="redis is not installed: pip install 'embedtrain[redis]'")


def struck(folder: Path, first: int, every: int) -> dict[str, Any]:
    """Kills publishers at these moments; returns by kind of place what was struck and what readers found."""
    with redis_server(folder) as redis:
        arguments = [str(folder), str(first), str(every), *([] if redis is None else [redis])]
        command = [sys.executable, "-m", "tests.faults.publishing", *arguments]
        done = launching.run(command, cwd=launching.ROOT, timeout=800)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_publisher_is_killed_at_some_moments(tmp_path: Path) -> None:
    for found in struck(tmp_path, 20, 50).values():
        assert sum(found["struck"].values()) >= 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_publisher_is_killed_at_every_moment(tmp_path: Path) -> None:
    for kind, found in struck(tmp_path, 1, 1).items():
        assert sum(found["struck"].values()) >= 60, kind
        assert min(found["ends"]["first"], found["ends"]["second"]) >= 10, "before the version is complete, and after"
