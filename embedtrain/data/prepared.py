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
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any, TypeVar

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from embedtrain import storage
from embedtrain.data.seal import (
    SEAL_NAME,
    Seal,
    SealedEntry,
    UnsealedError,
    Unverified,
    compare,
    read_seal,
    seal_file,
    time_of_change,
)
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError, is_wrong_path, printable
from embedtrain.schema import parse

T = TypeVar("T")

META_NAME = "meta.json"

_ABANDONED_SECONDS = 24 * 3600

_logger = logging.getLogger(__name__)

_FAULTS_OF_CONTENT = (ValueError, LookupError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What is raised of an entry that is not what was written; any other error is the disk's or the machine's."""


def prepared_entry(
    cache_path: str,
    name: str,
    open_entry: Callable[[str, Unverified], T],
    prepare: Callable[[str], None],
    ranks: Ranks,
) -> T:
    """Returns an entry of the cache, which is prepared unless it is there and sound.

    At every start sizes and times of change are compared with the seal, and files that changed are read again. Who
    trains on an entry compares all of its contents meanwhile: see `Verification`. An entry that is not sound is set
    aside for a day, or deleted if it has no seal, and prepared anew; a line says so. It is prepared under another name
    and renamed when it is complete: a preparation that was killed is done again.

    Collective: every rank.

    Args:
        cache_path: local folder, made if missing; all ranks must see the same one.
        name: of the entry; says of which data it is, so that other data make another.
        open_entry: opens the folder of an entry, given what of it is not verified: nothing of one that was prepared a
            moment ago. What it raises of a forged one is a fault of the entry.
        prepare: collective; fills the folder that it is given, which every rank sees.
        ranks: those of the run.

    Returns:
        What `open_entry` made of the folder.

    Raises:
        UserError: on every rank; what `prepare` raises, or a cache folder that is not local or may not be used.
        RuntimeError: a rank does not see the cache folder of the others.
    """
    cache_path = ranks.run_on_first(lambda: make_cache_folder(cache_path))
    require_visible(cache_path, ranks)
    entry_path = os.path.join(cache_path, name)
    found = _sound_entry(entry_path, open_entry, ranks)
    if found is None:
        work_path = ranks.run_on_first(lambda: _make_work_folder(entry_path))
        require_visible(work_path, ranks)
        try:
            prepare(work_path)
            _commit(work_path, entry_path, ranks)
        except BaseException:
            if ranks.rank == 0:
                shutil.rmtree(work_path, ignore_errors=True)
            raise
    require_visible(os.path.join(entry_path, SEAL_NAME), ranks)
    return ranks.run_on_each(lambda: open_entry(entry_path, () if found is None else (found,)))


def _sound_entry(entry_path: str, open_entry: Callable[[str, Unverified], object], ranks: Ranks) -> SealedEntry | None:
    """Collective: returns an entry if it is there and as it was written; sets aside what is not.

    The files whose times changed, all those of a cache that was copied, are read by all ranks, each its share.
    """
    found = ranks.run_on_first(lambda: _look(entry_path, open_entry))
    if found is None:
        return None
    entry, changed = found
    if not changed:
        return entry
    require_visible(os.path.join(entry_path, SEAL_NAME), ranks)
    own_fault = ranks.run_on_each(lambda: _first_fault(entry, sorted(changed)[ranks.rank :: ranks.size]))
    faults = [fault for fault in ranks.all_gather(own_fault) if fault is not None]
    return ranks.run_on_first(lambda: _seal_again(entry, changed, faults))


def _look(
    entry_path: str, open_entry: Callable[[str, Unverified], object]
) -> tuple[SealedEntry, dict[str, int]] | None:
    """Returns the entry, and when its files changed that did since it was sealed, in ns; None without a sound one."""
    try:
        _remove_abandoned(entry_path)
        os.lstat(entry_path)
    except FileNotFoundError:
        return None
    with _access_to(entry_path):
        try:
            if not stat.S_ISDIR(os.stat(entry_path).st_mode):
                raise ValueError(f"{entry_path} is no folder")
            seal = read_seal(entry_path)
            times = {name: time_of_change(entry_path, name, sealed) for name, sealed in seal.files.items()}
            open_entry(entry_path, ())
        except _FAULTS_OF_CONTENT as error:
            _put_away(entry_path, error)
            return None
    changed = {name: time for name, time in times.items() if time != seal.files[name].mtime_ns}
    return SealedEntry(entry_path, seal), changed


def _first_fault(entry: SealedEntry, names: Sequence[str]) -> str | None:
    """Reads files of an entry; says what is wrong with the first that is not what was written."""
    with _access_to(entry.path):
        try:
            for name in names:
                compare(entry.path, name, entry.seal.files[name])
        except _FAULTS_OF_CONTENT as error:
            return str(error)
    return None


@contextmanager
def _access_to(entry_path: str) -> Iterator[None]:
    """Tells the user of a path that cannot be used; a disk that fails is no user's mistake."""
    try:
        yield
    except OSError as error:
        if not is_wrong_path(error):
            raise
        raise UserError(f"the prepared data in {entry_path} cannot be read: {error}") from error


def _seal_again(entry: SealedEntry, changed: Mapping[str, int], faults: Sequence[str]) -> SealedEntry | None:
    """Seals files with their new times, so that the next start need not read them; sets the entry aside if it must."""
    if faults:
        _put_away(entry.path, ValueError(faults[0]))
        return None
    files = entry.seal.files
    seal = Seal({**files, **{name: replace(files[name], mtime_ns=time) for name, time in changed.items()}})
    try:
        path = os.path.join(entry.path, SEAL_NAME)
        storage.replace(path, json.dumps(asdict(seal), indent=1).encode(), f"{path}.tmp")
    except OSError as error:
        _logger.warning(f"{entry.path} could not be sealed again, and is read at every start: {error}")
    return SealedEntry(entry.path, seal)


def _put_away(entry_path: str, fault: Exception) -> None:
    """Renames what lies in the place of an entry, whatever it is, and deletes a folder without a seal."""
    aside = f"{entry_path}.{uuid.uuid4().hex[:8]}.damaged"
    try:
        # It is kept for a day from now on.
        with suppress(OSError):
            os.utime(entry_path, follow_symlinks=False)
        os.rename(entry_path, aside)
    except OSError as error:
        if not is_wrong_path(error):
            raise
        raise UserError(f"{entry_path} is damaged and cannot be set aside: {error}; remove it") from error
    becomes = f"set aside in {aside} for a day"
    if isinstance(fault, UnsealedError):
        # Nothing tells whether it is whole, and a copy of all prepared data is too much to keep for nothing.
        _remove(aside)
        becomes = "deleted"
    said = printable(str(fault) or type(fault).__name__)
    _logger.warning(f"{said}: the prepared data are {becomes}, and prepared anew")


def _remove_abandoned(entry_path: str) -> None:
    """Removes what others left beside an entry: attempts at it, and what was set aside, each once it is a day old."""
    cache_path, name = os.path.split(entry_path)
    for other in os.listdir(cache_path):
        if other.startswith(f"{name}."):
            path = os.path.join(cache_path, other)
            with suppress(OSError):  # Another job removes it too, or it belongs to another user.
                if time.time() - os.lstat(path).st_mtime > _ABANDONED_SECONDS:
                    _remove(path)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        os.remove(path)


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
    """Makes the folder of this attempt at an entry."""
    work_path = f"{entry_path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        os.mkdir(work_path)
    except PermissionError as error:
        raise UserError(f"cache path {os.path.dirname(entry_path)}: permission denied: {error}") from error
    return work_path


def _commit(work_path: str, entry_path: str, ranks: Ranks) -> None:
    """Collective: seals the folder of an attempt, each rank its share of the files, and gives it the entry's name."""
    names = ranks.run_on_first(lambda: sorted(os.listdir(work_path)))
    mine = names[ranks.rank :: ranks.size]
    own_files = ranks.run_on_each(lambda: {name: seal_file(work_path, name) for name in mine})
    sealed = {name: file for files in ranks.all_gather(own_files) for name, file in files.items()}
    ranks.run_on_first(lambda: _finish(work_path, entry_path, Seal({name: sealed[name] for name in names})))


def _finish(work_path: str, entry_path: str, seal: Seal) -> None:
    """Writes the seal and renames the folder; another job may have been first."""
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
