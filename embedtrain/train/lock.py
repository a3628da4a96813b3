"""One job at a time on a run folder: an owner file with a heartbeat, and its take-over from a dead owner."""

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
"""How often an owner shows that it lives."""

MAX_BEAT_SECONDS = 60.0
"""An owner file that promises fewer beats is not one: who finds it would watch for hours."""

STALE_BEATS = 12
"""An owner that misses so many beats while another job watches has lost the folder: a minute."""

OWNER = "owner-"
"""Begins the names of the files by which a job owns a folder."""

_OWNER_FILE = re.compile(rf"{OWNER}(\d{{8}})\.json(\.[0-9a-f]{{16}}\.tmp)?")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """What an owner file says. The annotations are the schema that it is checked against.

    Attributes:
        host: name of the owner's host, and the boot of it that the process belongs to.
        pid: its process there.
        started: when the kernel started that process, so that a later one of the same number is told apart.
        job: torchrun's run id, or nothing.
        since: UTC time in ISO 8601 at which it took the folder.
        beat_seconds: how often `beat` grows.
        beat: number of beats so far.
        token: random, its own.
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
        """Returns the owner for a message."""
        job = f", torchrun job {self.job}" if self.job else ""
        return printable(f"process {self.pid} on {self.host.partition('/')[0]}{job}, since {self.since}")


class RunLock:
    """Ownership of a run folder, for the time that it is entered: rank 0 holds it, every rank calls.

    The owner is who created the highest of the files `owner-00000001.json`, `owner-00000002.json`, ...; a
    file is created exclusively, so that of two jobs that want to take over one does. No clocks are compared:
    who finds an owner watches whether it beats. A live one is told within `beat_seconds`, and the folder
    refused; one whose process on this host is dead loses it at once; one that is not seen to beat for
    `STALE_BEATS` of its beats loses it then. An owner that lost the folder learns it before it saves.

    Args:
        path: run folder, any fsspec URL.
        ranks: those of the run.
        beat_seconds: how often to beat.
        key: names the setting or the option that gives the folder.
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
        """Takes the folder. Collective: every rank.

        Raises:
            UserError: another job is at work on it.
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
        """Gives the folder back; no collective."""
        self._is_leaving.set()
        if self._thread is not None:
            self._thread.join()
            with suppress(Exception):
                self._remove_up_to(self._number)
            # A start that was refused leaves nothing behind.
            for folder in self._made:
                storage.remove_empty_folder(folder)

    def check(self) -> None:
        """Makes sure that the folder is still this job's. Collective: every rank.

        Raises:
            CheckpointError: another job has taken it over.
        """
        self._ranks.run_on_first(self._check)

    def _check(self) -> None:
        newest = max(self._numbers(), default=0)
        if newest > self._number:
            raise CheckpointError(
                f"{self._path} was taken over by {_read(self._url(newest)).words()}, which did not see this job "
                "beat: nothing more is saved"
            )

    def _try_to_take(self) -> bool:
        """Takes the folder where nobody holds it or its owner is gone; sleeps a while where that is open yet."""
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
                return False  # given back at this very moment
            if not self._is_gone(owner):
                return False
            _logger.warning(f"{self._path} is taken over from {owner.words()}, which is gone")
        url = self._url(newest + 1)
        try:
            storage.create(url, self._encoded(), f"{url}.{self._own.token}.tmp")
        except FileExistsError:
            return False  # another was faster
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
            _logger.warning(f"{self._path} is held by {owner.words()}: watching for up to {patience:.0f} s if it lives")
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
            # A beat that is missed is made up for by the next; one too late is noticed by `check`.
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
        """Removes owner files, the lower numbers first, and what killed owners left of writing them."""
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
        raise UserError(f"{url} is not an owner file: {error}. Remove it if no job is at work there.") from error


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
    """Returns whether the owner's process, of this host, may still run; where the kernel does not tell, it may."""
    if not owner.started:
        return True
    return _start_of(owner.pid) == owner.started


def _start_of(pid: int) -> str | None:
    """Returns the kernel's start time of a process; None of one that is dead, and where there is no /proc."""
    # The name of the program stands in brackets and may hold any character.
    fields: list[Any] = _read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in ("Z", "X") else str(fields[19])


def _read_text(path: str) -> str:
    with suppress(OSError):
        return Path(path).read_text(encoding="ascii", errors="replace").strip()
    return ""
