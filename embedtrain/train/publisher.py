"""Publishes new checkpoints of a run while it trains, by running `embedtrain publish` in another process."""

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
"""Environment variables of torchrun. The child process must not get them, or it would act as a rank of the job."""

_logger = logging.getLogger(__name__)


class Publisher:
    """Publishes checkpoints of a run in another process, so that training does not wait.

    A publication that fails or takes too long logs a warning; the next one also publishes its rows.

    Args:
        run_path: path of the run folder.
        config: destination, interval and timeout of publications.
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
        """Starts a publication if one is due and there is a newer checkpoint; called after each step."""
        seconds = time.monotonic() - self._started_at
        if self._process is not None:
            if self._process.poll() is None and seconds < self._timeout_seconds:
                return
            self._conclude("training continues")
        if seconds >= self._every_seconds and self._complete_step() not in (None, self._begun_step):
            self._start()

    def finish(self) -> None:
        """Publishes the last checkpoint, which must be complete, and waits until this is done."""
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
            # The output is a few lines, which fit into the buffers of the pipes.
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C in the terminal must interrupt the run only.
            start_new_session=True,
        )

    def _conclude(self, what_follows: str) -> None:
        """Waits for the last publication, up to its timeout, and logs the result.

        Args:
            what_follows: text for the warning if it failed.
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
