"""Records when, by which command and from which commit a run was started."""

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
from embedtrain.config.secrets import hide_secrets, without_secrets
from embedtrain.storage import base_name

_GIT_SECONDS = 5.0


def start_facts(step: int, num_ranks: int) -> dict[str, Any]:
    """Returns the facts of this start of a run, as JSON.

    Args:
        step: step that the run continues from; 0 for a new run.
        num_ranks: number of ranks that train.

    Returns:
        `time` in UTC, `step`, `ranks`, `version` of embedtrain, `torch`, `python`, `command` and `commit`. `commit` is
        the commit of the current folder's git repository, with `-dirty` if files have changed; null outside a
        repository.
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
    """Returns a command line that can be typed into a shell, without passwords and tokens."""
    program = base_name(words[0]) if words else ""
    first = "embedtrain" if program in ("embedtrain", "__main__.py") else program
    # An option such as --token and its value are two words.
    names = ["", *words[1:-1]]
    told = (_without_secrets(name, word) for name, word in zip(names, words[1:], strict=False))
    return shlex.join([first, *told])


def _without_secrets(name: str, word: str) -> str:
    """Returns a word of a command without its secrets; `name` is the word before it."""
    if name.startswith("--") and "=" not in name and not word.startswith("-"):
        return str(hide_secrets(name.lstrip("-"), word))
    key, equals, value = word.partition("=")
    if equals and "://" not in key and "{" not in key:
        return f"{key}={hide_secrets(key.lstrip('-'), value)}" if value != "null" else word
    return without_secrets(word)


def git_commit() -> str | None:
    """Returns the commit of the current folder's git repository; None without a repository, or if git fails."""
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Without optional locks git writes nothing; otherwise it may refresh the index.
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, timeout=_GIT_SECONDS, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Read as bytes: for a folder with an odd name, git's output may not be UTF-8.
    return done.stdout.decode("ascii", "replace").strip() or None if done.returncode == 0 else None
