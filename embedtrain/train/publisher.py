"""Publishes a run while it trains: `embedtrain publish` in a process of its own, for newer checkpoints."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

from embedtrain import storage
from embedtrain.config.sections import PublishConfig

_OF_A_RANK = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
"""Variables of torchrun, without which a process is no rank of the job."""

_logger = logging.getLogger(__name__)


class Publisher:
    """Has the checkpoint that answers for the run published by another process, so that training waits for nothing.

    A publication that fails, or takes too long, is warned of; the next one publishes what it missed.

    Args:
        run_path: the run folder.
        config: where to, how often, and how long a publication may take.
        complete_step: returns the step of the newest complete checkpoint; None if there is none.
    """

    def __init__(self, run_path: str, config: PublishConfig, complete_step: Callable[[], int | None]) -> None:
        assert config.to is not None
        self._shown_url = storage.shown(config.to)
        self._again = f"embedtrain publish {run_path} --to {self._shown_url}"
        self._command = [sys.executable, "-m", "embedtrain", "publish", run_path, "--to", config.to]
        self._every_seconds, self._timeout_seconds = config.every_seconds, config.timeout_seconds
        self._complete_step = complete_step
        self._begun_step: int | None = None
        self._started_at = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None

    def step(self) -> None:
        """Starts a publication if it is time and there is a newer checkpoint; called after each step."""
        seconds = time.monotonic() - self._started_at
        if self._process is not None:
            if self._process.poll() is None and seconds < self._timeout_seconds:
                return
            self._conclude("training goes on")
        if seconds >= self._every_seconds and self._complete_step() not in (None, self._begun_step):
            self._start()

    def finish(self) -> None:
        """Publishes the last checkpoint, which must be complete, and waits for it."""
        self._conclude("the last checkpoint follows")
        self._start()
        self._conclude(f"{self._again} publishes the last checkpoint")

    def _start(self) -> None:
        self._started_at, self._begun_step = time.monotonic(), self._complete_step()
        environment = {name: value for name, value in os.environ.items() if not _OF_A_RANK.fullmatch(name)}
        self._process = subprocess.Popen(
            self._command,
            env=environment,
            stdin=subprocess.DEVNULL,
            # A few lines, which pipes hold until they are read.
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # An interrupt from the terminal is for the run.
            start_new_session=True,
        )

    def _conclude(self, what_follows: str) -> None:
        """Waits for the publication that was started last, for as long as it may take, and says what became of it.

        Args:
            what_follows: what to say if it failed.
        """
        process, self._process = self._process, None
        if process is None:
            return
        done: list[str] = []
        try:
            output = process.communicate(timeout=max(0.0, self._started_at + self._timeout_seconds - time.monotonic()))
            done, wrong = (text.decode(errors="replace").splitlines() for text in output)
            reason = wrong[-1] if wrong else f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            reason = f"it took longer than publish.timeout_seconds={self._timeout_seconds:g}, and was ended"
        if process.returncode == 0:
            gone = [line.strip() for line in done[1:] if ": gone" in line]
            _logger.info(f"published: {'; '.join([*done[:1], *gone]) or self._shown_url}")
        else:
            self._begun_step = None
            _logger.warning(f"not published to {self._shown_url}, {what_follows}: {reason}")
