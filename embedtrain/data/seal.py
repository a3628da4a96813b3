"""The seal of a folder of prepared data: sizes, times and checksums of its files, and their verification."""

from __future__ import annotations

import json
import logging
import os
import stat
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

import xxhash
from pydantic import Field

from embedtrain import storage
from embedtrain.errors import CheckpointError, printable
from embedtrain.schema import Count, parse

SEAL_NAME = "seal.json"

_BLOCK_BYTES = 4 << 20

_logger = logging.getLogger(__name__)

FileName = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Name of the seal's file in an entry's folder."""


class UnsealedError(ValueError):
    """A folder has no seal: its preparation was not completed, or its seal was removed."""


@dataclass(frozen=True)
class SealedFile:
    """Holds size, modification time and xxh3_128 checksum (hex) of a file."""

    bytes: Count
    mtime_ns: Annotated[int, Field(strict=True)]
    xxh3: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{32}$")]


@dataclass(frozen=True)
class Seal:
    """Holds the sealed files of a folder, by name."""

    files: dict[FileName, SealedFile]


@dataclass(frozen=True)
class SealedEntry:
    """A folder of prepared data and its seal; only sizes and modification times were compared so far."""

    path: str
    seal: Seal


Unverified = tuple[SealedEntry, ...]
"""Entries in use whose checksums were not compared yet in this run."""


def read_seal(entry_path: str) -> Seal:
    """Returns the seal of a folder.

    Raises:
        UnsealedError: the folder has no seal.
        ValueError: the file is not a seal.
    """
    path = os.path.join(entry_path, SEAL_NAME)
    try:
        return parse(Seal, json.loads(storage.read(path)))
    except FileNotFoundError:
        raise UnsealedError(f"{entry_path} has no {SEAL_NAME}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a seal: {error}") from error


def seal_file(folder: str, name: str) -> SealedFile:
    """Reads a file and returns its entry for the seal."""
    path = os.path.join(folder, name)
    found = os.stat(path)
    return SealedFile(found.st_size, found.st_mtime_ns, _checksum(path))


def time_of_change(entry_path: str, name: str, sealed: SealedFile) -> int:
    """Returns the modification time of a file in ns.

    Raises:
        ValueError: the file has another size than its seal says, or is not a file.
    """
    path = os.path.join(entry_path, name)
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {storage.oddity(path)}")
    if found.st_size != sealed.bytes:
        raise ValueError(f"{path} has {found.st_size:,} bytes, and {sealed.bytes:,} were written")
    return found.st_mtime_ns


def compare(entry_path: str, name: str, sealed: SealedFile) -> None:
    """Compares a file with its checksum.

    Raises:
        ValueError: the checksum differs.
    """
    path = os.path.join(entry_path, name)
    if _checksum(path) != sealed.xxh3:
        raise ValueError(f"{path} is damaged: its checksum differs")


def _checksum(path: str) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


class Verification:
    """Compares all checksums of some entries in a background thread.

    A damaged entry loses its seal at once, so that the next start prepares it again.

    Args:
        entries: the entries to read, in this order.
        patience_seconds: maximum seconds, in total, that `require_sound` waits for the thread before the last save.
    """

    def __init__(self, entries: Sequence[SealedEntry], patience_seconds: float) -> None:
        self._entries = entries
        self._patience_seconds = patience_seconds
        self._fault: str | None = None
        self._thread = threading.Thread(target=self._verify, name="embedtrain-prepared-data", daemon=True)
        self._thread.start()

    def require_sound(self, *, is_last: bool) -> None:
        """Raises CheckpointError if an entry was found damaged.

        Args:
            is_last: whether the run ends with the next save; if so, waits for the thread, and warns if it does not end
                in time.
        """
        if is_last and self._patience_seconds:
            self._thread.join(self._patience_seconds)
            if self._thread.is_alive():
                _logger.warning(
                    f"the run waited {self._patience_seconds:.0f} seconds at its end, and not all of its prepared data "
                    "are compared with their checksums: the next run on them compares them from the beginning"
                )
            self._patience_seconds = 0.0
        if self._fault is not None:
            raise CheckpointError(
                f"{self._fault}. The prepared data were damaged on the disk, and what was trained on them since the "
                "last checkpoint is not saved: start again, and they are prepared again"
            )

    def _verify(self) -> None:
        for entry in self._entries:
            try:
                for name, sealed in entry.seal.files.items():
                    compare(entry.path, name, sealed)
            except (FileNotFoundError, NotADirectoryError):
                continue  # Another job has set the entry aside; the files that this job has open stay readable.
            except OSError as error:
                _logger.warning(f"cannot compare {entry.path} with its checksums: {error}")
            except ValueError as error:
                self._fault = printable(str(error))
                with suppress(OSError):
                    os.remove(os.path.join(entry.path, SEAL_NAME))
