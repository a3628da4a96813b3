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
from embedtrain.config.secrets import hide_secrets, without_secrets
from embedtrain.storage import base_name

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
    """Returns the words of a command as they would be typed, without passwords and tokens."""
    program = base_name(words[0]) if words else ""
    first = "embedtrain" if program in ("embedtrain", "__main__.py") else program
    # The value of an option such as --token is a word of its own.
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
    """Returns the commit of the current folder's git repository; None if there is none, or git does not answer."""
    command = ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # Without optional locks git writes nothing, not even a refreshed index.
        env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, capture_output=True, timeout=_GIT_SECONDS, check=False, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # As bytes: what git says of a folder with an odd name need not be UTF-8.
    return done.stdout.decode("ascii", "replace").strip() or None if done.returncode == 0 else None
