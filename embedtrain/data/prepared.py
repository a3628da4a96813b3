"""Prepared data in a local folder: made once, under a name that says of what, sealed, and checked at every start.

The seal is a file that is written last: the size, the time of change and the checksum of every other file of the
entry. An entry is complete if it has one. What is not as the seal says is set aside, and the data are prepared anew.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Annotated, Any, TypeVar

import fsspec
import numpy as np
import xxhash
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray
from pydantic import Field

from embedtrain import storage
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import CheckpointError, UserError, is_wrong_path, printable
from embedtrain.schema import Count, parse

T = TypeVar("T")

SEAL_NAME = "seal.json"
META_NAME = "meta.json"

_ABANDONED_SECONDS = 24 * 3600
_BLOCK_BYTES = 4 << 20

_logger = logging.getLogger(__name__)

Check = Callable[[], None]
"""Raises CheckpointError if prepared data were found damaged while a run trains on them."""

FileName = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Of a file in an entry's folder, and nowhere else."""


@dataclass(frozen=True)
class _SealedFile:
    """A file as it was written; xxh3_128 in hex."""

    bytes: Count
    mtime_ns: Annotated[int, Field(strict=True)]
    xxh3: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{32}$")]


@dataclass(frozen=True)
class _Seal:
    files: dict[FileName, _SealedFile]


def prepared_entry(
    cache_path: str, name: str, open_entry: Callable[[str], T], prepare: Callable[[str], None], ranks: Ranks
) -> tuple[T, Check]:
    """Returns an entry of the cache, which is prepared unless it is there and sound.

    At every start sizes and times of change are compared with the seal, and files that changed are read again. All
    of the contents are compared on a thread of rank 0 while the run goes on. An entry that is not sound is set aside
    and prepared anew, and a line says so. It is prepared under another name and renamed when it is complete: a
    preparation that was killed is done again.

    Collective: every rank.

    Args:
        cache_path: local folder, made if missing; all ranks must see the same one.
        name: of the entry; says of which data it is, so that other data make another.
        open_entry: opens the folder of an entry; what it raises of an unsealed or forged one is a fault of the entry.
        prepare: collective; fills the folder that it is given, which every rank sees.
        ranks: those of the run.

    Returns:
        What `open_entry` made of the folder; and what rank 0 calls to learn what the thread has found.

    Raises:
        UserError: on every rank; what `prepare` raises, or a cache folder that is not local or may not be written.
        RuntimeError: a rank does not see the cache folder of the others.
    """
    cache_path = ranks.run_on_first(lambda: make_cache_folder(cache_path))
    require_visible(cache_path, ranks)
    entry_path = os.path.join(cache_path, name)
    is_old = ranks.run_on_first(lambda: _is_sound(entry_path, open_entry))
    if not is_old:
        work_path = ranks.run_on_first(lambda: _make_work_folder(entry_path))
        require_visible(work_path, ranks)
        try:
            prepare(work_path)
            ranks.run_on_first(lambda: _commit(work_path, entry_path))
        except BaseException:
            if ranks.rank == 0:
                shutil.rmtree(work_path, ignore_errors=True)
            raise
    require_visible(os.path.join(entry_path, SEAL_NAME), ranks)
    opened = ranks.run_on_each(lambda: open_entry(entry_path))
    # What was written a moment ago is not read again.
    return opened, _Verification(entry_path).check if is_old and ranks.rank == 0 else nothing_found


def nothing_found() -> None:
    """Finds nothing wrong."""


def _is_sound(entry_path: str, open_entry: Callable[[str], object]) -> bool:
    """Tells whether an entry is there and as it was written; sets aside what is not."""
    if not os.path.lexists(entry_path):
        return False
    try:
        seal = _read_seal(entry_path)
        changed = [name for name, sealed in seal.files.items() if not _has_its_time(entry_path, name, sealed)]
        for name in changed:
            _compare(entry_path, name, seal.files[name])
        open_entry(entry_path)
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, RecursionError) as error:
        fault = str(error) or type(error).__name__
        aside = _set_aside(entry_path)
        _logger.warning(f"{printable(fault)}: the prepared data are set aside in {aside}, and prepared anew")
        return False
    if changed:
        # It was copied, and need not be read again at the next start.
        _write_seal(entry_path, _Seal({**seal.files, **{name: _sealed(entry_path, name) for name in changed}}))
    return True


def _read_seal(entry_path: str) -> _Seal:
    path = os.path.join(entry_path, SEAL_NAME)
    if not os.path.isdir(entry_path):
        raise ValueError(f"{entry_path} is no folder")
    if not os.path.lexists(path):
        raise ValueError(f"{entry_path} has no {SEAL_NAME}")
    try:
        return parse(_Seal, json.loads(storage.read(path)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no seal: {error}") from error


def _has_its_time(entry_path: str, name: str, sealed: _SealedFile) -> bool:
    """Tells whether a file was not changed since it was sealed.

    Raises:
        ValueError: it has another size, or is no file.
    """
    path = os.path.join(entry_path, name)
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {storage.oddity(path)}")
    if found.st_size != sealed.bytes:
        raise ValueError(f"{path} has {found.st_size:,} bytes, and {sealed.bytes:,} were written")
    return found.st_mtime_ns == sealed.mtime_ns


def _compare(entry_path: str, name: str, sealed: _SealedFile) -> None:
    path = os.path.join(entry_path, name)
    if _checksum(path) != sealed.xxh3:
        raise ValueError(f"{path} does not hold what was written: its checksum differs")


def _checksum(path: str) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sealed(entry_path: str, name: str) -> _SealedFile:
    path = os.path.join(entry_path, name)
    found = os.stat(path)
    return _SealedFile(found.st_size, found.st_mtime_ns, _checksum(path))


def _write_seal(entry_path: str, seal: _Seal) -> None:
    try:
        path = os.path.join(entry_path, SEAL_NAME)
        storage.replace(path, json.dumps(asdict(seal), indent=1).encode(), f"{path}.tmp")
    except OSError as error:
        _logger.warning(f"{entry_path} could not be sealed again, and is read at every start: {error}")


def _set_aside(entry_path: str) -> str:
    """Renames what lies in the place of an entry, whatever it is; returns its new name."""
    aside = f"{entry_path}.{uuid.uuid4().hex[:8]}.damaged"
    try:
        os.rename(entry_path, aside)
    except OSError as error:
        if not is_wrong_path(error):
            raise
        raise UserError(f"{entry_path} is damaged and cannot be set aside: {error}; remove it") from error
    return aside


class _Verification:
    """Reads all of an entry on a thread, and says so when asked if it is not what was written.

    A damaged entry loses its seal at once, so that the next start prepares it anew.
    """

    def __init__(self, entry_path: str) -> None:
        self._path = entry_path
        self._seal = _read_seal(entry_path)
        self._fault: str | None = None
        threading.Thread(target=self._verify, name="embedtrain-prepared-data", daemon=True).start()

    def check(self) -> None:
        """Raises CheckpointError if the entry was found damaged."""
        if self._fault is not None:
            raise CheckpointError(
                f"{self._fault}. The prepared data were damaged on the disk, and what was trained on them since the "
                "last checkpoint is not saved: start again, and they are prepared anew"
            )

    def _verify(self) -> None:
        try:
            for name, sealed in self._seal.files.items():
                _compare(self._path, name, sealed)
        except FileNotFoundError:
            return  # Another job has set it aside; what this one has open stays.
        except (OSError, ValueError) as error:
            self._fault = printable(str(error))
            with suppress(OSError):
                os.remove(os.path.join(self._path, SEAL_NAME))


def make_cache_folder(cache_path: str) -> str:
    """Makes the folder of the cache, if missing, and returns its path.

    Raises:
        UserError: it is not local, or cannot be made.
    """
    if "::" in cache_path:
        raise UserError(f"cache path {cache_path}: `::` chains file systems that are only read; give a local folder")
    fs, path = fsspec.core.url_to_fs(cache_path)
    if not isinstance(fs, LocalFileSystem):
        raise UserError(
            f"cache path {cache_path}: expected a local folder, whose files can be memory-mapped, "
            f"got one on {fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]}"
        )
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        if not is_wrong_path(error):
            raise
        raise UserError(f"cache path {cache_path}: the folder cannot be made: {error}") from error
    return str(path)


def _make_work_folder(entry_path: str) -> str:
    """Makes the folder of this attempt at an entry, and removes those that others abandoned."""
    cache_path, name = os.path.split(entry_path)
    for other in os.listdir(cache_path):
        path = os.path.join(cache_path, other)
        if other.startswith(f"{name}.") and time.time() - os.lstat(path).st_mtime > _ABANDONED_SECONDS:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                os.remove(path)
    work_path = f"{entry_path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        os.mkdir(work_path)
    except PermissionError as error:
        raise UserError(f"cache path {cache_path}: permission denied: {error}") from error
    return work_path


def _commit(work_path: str, entry_path: str) -> None:
    """Seals the folder of an attempt and gives it the entry's name; another job may have been first."""
    seal = _Seal({name: _sealed(work_path, name) for name in sorted(os.listdir(work_path))})
    with open(os.path.join(work_path, SEAL_NAME), "w", encoding="utf-8") as file:
        json.dump(asdict(seal), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.rename(work_path, entry_path)
    except OSError:
        if not os.path.exists(os.path.join(entry_path, SEAL_NAME)):
            raise
        shutil.rmtree(work_path, ignore_errors=True)


def require_visible(path: str, ranks: Ranks) -> None:
    """Collective: raises on every rank when one does not see what rank 0 made."""
    error = None
    if not os.path.exists(path):
        error = RuntimeError(
            f"rank {ranks.rank} on {socket.gethostname()} does not see {path}, which rank 0 made: the "
            "cache folder must be on a file system that all ranks share"
        )
    ranks.fail_together(error)


def read_contents(path: str, kind: type[T]) -> T:
    """Returns the table of contents of an entry, `META_NAME`, as the dataclass that declares it.

    Raises:
        ValueError: it is not one.
    """
    url = os.path.join(path, META_NAME)
    try:
        return parse(kind, json.loads(storage.read(url)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url}: {error}") from error


def map_values(path: str, dtype: np.dtype[Any], num_values: int) -> NDArray[Any]:
    """Returns [num_values], the content of a file of an entry, memory-mapped.

    Raises:
        RuntimeError: the file does not have the size it was written with.
    """
    size_bytes, expected = os.path.getsize(path), num_values * dtype.itemsize
    if size_bytes != expected:
        raise RuntimeError(
            f"{path}: {size_bytes} bytes where {expected} were written; remove the folder {os.path.dirname(path)} and "
            "it is prepared again"
        )
    # A file of no bytes cannot be mapped.
    return np.memmap(path, dtype, mode="r") if num_values else np.zeros(0, dtype)
