"""Where a run comes from: when, by which command and from which commit it was started."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from embedtrain.checkpoint.writer import own_version
from embedtrain.storage import base_name, shown

_GIT_SECONDS = 5.0


def start_facts(step: int, num_ranks: int) -> dict[str, Any]:
    """Returns the facts of this start of a run, as JSON.

    Args:
        step: that the run goes on from; 0 of a new run.
        num_ranks: that train.

    Returns:
        `time` in UTC, `step`, `ranks`, `version` of embedtrain, `torch`, `python`, `command`, and `commit`: that of the
        git repository that the command was given in, with `-dirty` if files differ from it; null outside of one.
    """
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": step,
        "ranks": num_ranks,
        "version": own_version(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "command": command_line(sys.argv),
        "commit": git_commit(),
    }


def command_line(words: Sequence[str]) -> str:
    """Returns the words of a command as they would be typed, without the passwords of URLs."""
    program = base_name(words[0]) if words else ""
    first = "embedtrain" if program in ("embedtrain", "__main__.py") else program
    return shlex.join([first, *map(_without_password, words[1:])])


def _without_password(word: str) -> str:
    name, equals, value = word.partition("=")
    # The = of a URL's query is not that of a setting.
    return f"{name}={shown(value)}" if equals and "://" not in name else shown(word)


def git_commit() -> str | None:
    """Returns the commit of the current folder's git repository; None if there is none, or git does not answer."""
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Without optional locks git writes nothing, not even a refreshed index.
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
