"""Ensures that only one job uses a run folder: an owner file with a heartbeat, and take-over from a dead owner."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

from pydantic import Field

from embedtrain import storage
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import CheckpointError, UserError, is_wrong_path, printable
from embedtrain.schema import Count, parse

BEAT_SECONDS = 5.0
"""Interval of an owner's heartbeat, in seconds."""

MAX_BEAT_SECONDS = 60.0
"""Longest valid heartbeat interval. An owner file with a longer one is rejected: another job would wait for hours."""

STALE_BEATS = 12
"""An owner that misses this many heartbeats while another job watches loses the folder; by default after a minute."""

OWNER = "owner-"
"""Prefix of the names of owner files."""

_OWNER_FILE = re.compile(rf"{OWNER}(\d{{8}})\.json(\.[0-9a-f]{{16}}\.tmp)?")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Holds the content of an owner file, which is validated against the annotations.

    Attributes:
        host: name of the owner's host and the host's boot id.
        pid: process id of the owner.
        started: start time of the process, as the kernel reports it; distinguishes it from a later process with the
            same id. Empty if the kernel does not report it.
        job: torchrun's run id, or empty.
        since: UTC time in ISO 8601 at which the owner took the folder.
        beat_seconds: interval at which `beat` grows.
        beat: number of heartbeats so far.
        token: a random token of this owner.
    """

    host: str
    pid: Annotated[int, Field(strict=True, ge=1, le=2**31)]
    started: str
    job: str
    since: str
    beat_seconds: Annotated[float, Field(strict=True, gt=0, le=MAX_BEAT_SECONDS, allow_inf_nan=False)]
    beat: Count
    token: str

    def words(self) -> str:
        """Returns a description of the owner for messages."""
        job = f", torchrun job {self.job}" if self.job else ""
        return printable(f"process {self.pid} on {self.host.partition('/')[0]}{job}, since {self.since}")


class RunLock:
    """Owns a run folder while entered. Rank 0 holds the ownership; every rank must enter.

    The owner is the job that created the file with the highest number among `owner-00000001.json`,
    `owner-00000002.json`, .... Each file is created exclusively, so only one of two competing jobs gets the folder.

    A job that finds an owner watches its heartbeat, so clocks of different hosts are never compared:

    - If the owner beats, which shows within `beat_seconds`, the job raises an error.
    - If the owner's process ran on this host and is dead, the job takes the folder over at once.
    - If the owner does not beat for `STALE_BEATS` of its intervals, the job takes the folder over then.

    An owner that has lost the folder notices this before its next save, in `check`.

    Args:
        path: run folder, any fsspec URL.
        ranks: the ranks of the run.
        beat_seconds: heartbeat interval.
        key: name of the setting or option that gives the folder, for messages.
    """

    def __init__(self, path: str, ranks: Ranks, *, beat_seconds: float = BEAT_SECONDS, key: str = "run.path") -> None:
        self._path, self._key = path, key
        self._ranks = ranks
        self._number = 0
        self._own = _this_process(beat_seconds)
        self._made: list[str] = []
        self._watched: tuple[str, int] | None = None
        self._watched_since = 0.0
        self._is_leaving = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        """Takes ownership of the folder. Collective: every rank.

        Raises:
            UserError: another job uses the folder.
        """
        while not self._ranks.run_on_first(self._try_to_take):
            pass
        if self._ranks.rank == 0:
            self._thread = threading.Thread(target=self._keep_beating, name="embedtrain-run-lock", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the folder; not a collective."""
        self._is_leaving.set()
        if self._thread is not None:
            self._thread.join()
            with suppress(Exception):
                self._remove_up_to(self._number)
            # If the start was refused, the folders that this job created are still empty and are removed.
            for folder in self._made:
                storage.remove_empty_folder(folder)

    def check(self) -> None:
        """Checks that this job still owns the folder. Collective: every rank.

        Raises:
            CheckpointError: another job has taken the folder over.
        """
        self._ranks.run_on_first(self._check)

    def _check(self) -> None:
        newest = max(self._numbers(), default=0)
        if newest > self._number:
            raise CheckpointError(
                f"{self._path} was taken over by {_read(self._url(newest)).words()}, because the heartbeat of this job "
                "had stopped: this job saves nothing more"
            )

    def _try_to_take(self) -> bool:
        """Takes the folder if it has no owner or its owner is gone; returns whether it did, perhaps after a sleep."""
        try:
            self._made += storage.make_folder(self._path)
        except OSError as error:
            if not is_wrong_path(error):
                raise
            raise UserError(
                f"{self._key}={self._path}: the folder cannot be made: {error.strerror}: {error.filename}; give a path "
                "that this user may write to"
            ) from error
        newest = max(self._numbers(), default=0)
        if newest:
            try:
                owner = _read(self._url(newest))
            except FileNotFoundError:
                return False  # the owner has just released the folder
            if not self._is_gone(owner):
                return False
            _logger.warning(f"{self._path} is taken over from {owner.words()}, which is gone")
        url = self._url(newest + 1)
        try:
            storage.create(url, self._encoded(), f"{url}.{self._own.token}.tmp")
        except FileExistsError:
            return False  # another job was faster
        self._number = newest + 1
        self._remove_up_to(newest)
        return True

    def _is_gone(self, owner: Owner) -> bool:
        if owner.host == self._own.host and not _is_running(owner):
            return True
        now = time.monotonic()
        if self._watched is None or self._watched[0] != owner.token:
            self._watched, self._watched_since = (owner.token, owner.beat), now
            patience = STALE_BEATS * owner.beat_seconds
            _logger.warning(
                f"{self._path} is held by {owner.words()}: waiting up to {patience:.0f} s to see whether it still runs"
            )
        if owner.beat != self._watched[1]:
            raise UserError(
                f"{self._path} is in use by {owner.words()}: two jobs on one folder would destroy each other's "
                f"work. Stop that job, or give this one another {self._key}."
            )
        if now - self._watched_since > STALE_BEATS * owner.beat_seconds:
            return True
        time.sleep(min(1.0, owner.beat_seconds / 4))
        return False

    def _keep_beating(self) -> None:
        while not self._is_leaving.wait(self._own.beat_seconds):
            self._own = replace(self._own, beat=self._own.beat + 1)
            # The next beat makes up for a failed one. If beats fail for too long, `check` notices the lost folder.
            with suppress(Exception):
                if max(self._numbers(), default=0) == self._number:
                    url = self._url(self._number)
                    storage.replace(url, self._encoded(), f"{url}.{self._own.token}.tmp")

    def _encoded(self) -> bytes:
        return json.dumps(asdict(self._own)).encode() + b"\n"

    def _url(self, number: int) -> str:
        return storage.join(self._path, f"{OWNER}{number:08d}.json")

    def _numbers(self) -> list[int]:
        matches = [_OWNER_FILE.fullmatch(name) for name in storage.list_names(self._path)]
        return [int(match[1]) for match in matches if match and not match[2]]

    def _remove_up_to(self, last: int) -> None:
        """Removes owner files up to a number, lowest first, and temporary files that killed owners left."""
        for name in sorted(storage.list_files(self._path)):
            match = _OWNER_FILE.fullmatch(name)
            if match and int(match[1]) <= last:
                storage.remove(storage.join(self._path, name))


def _read(url: str) -> Owner:
    try:
        if (what := storage.oddity(url)) is not None:
            raise ValueError(f"it is {what}")
        return parse(Owner, json.loads(storage.read(url)))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{url} is not an owner file: {error}. Remove it if no job uses this folder.") from error


def _this_process(beat_seconds: float) -> Owner:
    return Owner(
        host=f"{socket.gethostname()}/{_read_text('/proc/sys/kernel/random/boot_id')}",
        pid=os.getpid(),
        started=_start_of(os.getpid()) or "",
        job=os.environ.get("TORCHELASTIC_RUN_ID", "").removeprefix("none"),
        since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        beat_seconds=beat_seconds,
        beat=0,
        token=secrets.token_hex(8),
    )


def _is_running(owner: Owner) -> bool:
    """Returns whether the owner's process on this host may still run; True if the kernel does not report it."""
    if not owner.started:
        return True
    return _start_of(owner.pid) == owner.started


def _start_of(pid: int) -> str | None:
    """Returns the kernel's start time of a process; None if the process is dead or there is no /proc."""
    # The program's name is in brackets and may contain any character, so split after the last bracket.
    fields: list[Any] = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in ("Z", "X") else str(fields[19])


def _read_text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    return ""
