"""Publishes a run while it trains: `embedtrain publish` in a process of its own, every so many seconds."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time

_OF_A_RANK = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")
"""Variables of torchrun, without which a process is no rank of the job."""

_logger = logging.getLogger(__name__)


class Publisher:
    """Has the checkpoint that answers for the run published every so many seconds.

    Another process reads it from the run folder, so that training waits for nothing. A publication that fails is
    warned of, and the next one publishes what it missed.

    Args:
        run_path: the run folder.
        url: of the consumer.
        every_seconds: between two publications; one that takes longer delays the next.
    """

    def __init__(self, run_path: str, url: str, every_seconds: float) -> None:
        self._url = url
        self._command = [sys.executable, "-m", "embedtrain", "publish", run_path, "--to", url]
        self._every_seconds = every_seconds
        self._started_at = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None

    def step(self) -> None:
        """Starts a publication if it is time; called after each step."""
        if time.monotonic() - self._started_at < self._every_seconds:
            return
        if self._process is not None and self._process.poll() is None:
            return
        self._conclude()
        self._start()

    def finish(self) -> None:
        """Publishes the last checkpoint, which must be complete, and waits for it."""
        self._conclude()
        self._start()
        self._conclude()

    def _start(self) -> None:
        self._started_at = time.monotonic()
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

    def _conclude(self) -> None:
        """Waits for the publication that was started last, and says what became of it."""
        if self._process is None:
            return
        done, wrong = (text.decode(errors="replace").splitlines() for text in self._process.communicate())
        status, self._process = self._process.returncode, None
        if status == 0:
            _logger.info(f"published: {done[0] if done else self._url}")
        else:
            reason = wrong[-1] if wrong else f"exit status {status}"
            _logger.warning(f"not published to {self._url}, training goes on: {reason}")
