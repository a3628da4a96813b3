"""The cache of prepared data: entries are prepared once, sealed, and checked at every start.

The seal is a file written last, with the size, modification time and checksum of every other file of the entry. An
entry is complete if it has a seal. An entry that does not match its seal is set aside and prepared again.
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
"""Errors of a damaged entry; any other error is a fault of the disk or the machine."""


def prepared_entry(
    cache_path: str,
    name: str,
    open_entry: Callable[[str, Unverified], T],
    prepare: Callable[[str], None],
    ranks: Ranks,
) -> T:
    """Returns an entry of the cache, and prepares it first if it is missing or damaged.

    Every start compares sizes and modification times with the seal, and checksums of files whose time changed. During
    training a thread compares all checksums: see `Verification`. A damaged entry is set aside for a day, or deleted if
    it has no seal, and prepared again; a warning says so. Preparation happens under a temporary name and ends with a
    rename, so a killed preparation is repeated.

    Collective: every rank.

    Args:
        cache_path: local folder that all ranks see, created if missing.
        name: name of the entry, a hash of everything that the data depend on.
        open_entry: opens the folder of an entry, given the files that are not verified yet (none if it was just
            prepared). An error that it raises counts as damage of the entry.
        prepare: collective; fills the given folder, which every rank sees.
        ranks: the ranks of the run.

    Returns:
        The result of `open_entry`.

    Raises:
        UserError: on every rank; `prepare` raised it, or the cache folder is not local or not accessible.
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
    """Returns an entry if it exists and matches its seal; sets a damaged one aside. Collective: every rank.

    Files whose time changed (in a copied cache, all files) are divided among the ranks and read.
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
    """Returns the entry and the times, in ns, of files changed since the sealing; None if there is no sound entry."""
    try:
        _remove_abandoned(entry_path)
        os.lstat(entry_path)
    except FileNotFoundError:
        return None
    with _access_to(entry_path):
        try:
            if not stat.S_ISDIR(os.stat(entry_path).st_mode):
                raise ValueError(f"{entry_path} is not a folder")
            seal = read_seal(entry_path)
            times = {name: time_of_change(entry_path, name, sealed) for name, sealed in seal.files.items()}
            open_entry(entry_path, ())
        except _FAULTS_OF_CONTENT as error:
            _put_away(entry_path, error)
            return None
    changed = {name: time for name, time in times.items() if time != seal.files[name].mtime_ns}
    return SealedEntry(entry_path, seal), changed


def _first_fault(entry: SealedEntry, names: Sequence[str]) -> str | None:
    """Compares files of an entry with their checksums; returns a description of the first damaged one, or None."""
    with _access_to(entry.path):
        try:
            for name in names:
                compare(entry.path, name, entry.seal.files[name])
        except _FAULTS_OF_CONTENT as error:
            return str(error)
    return None


@contextmanager
def _access_to(entry_path: str) -> Iterator[None]:
    """Turns errors about an inaccessible path into UserError; other errors, such as of a failing disk, stay."""
    try:
        yield
    except OSError as error:
        if not is_wrong_path(error):
            raise
        raise UserError(f"cannot read the prepared data in {entry_path}: {error}") from error


def _seal_again(entry: SealedEntry, changed: Mapping[str, int], faults: Sequence[str]) -> SealedEntry | None:
    """Updates the times in the seal, so that the next start need not read the files; may set the entry aside."""
    if faults:
        _put_away(entry.path, ValueError(faults[0]))
        return None
    files = entry.seal.files
    seal = Seal({**files, **{name: replace(files[name], mtime_ns=time) for name, time in changed.items()}})
    try:
        path = os.path.join(entry.path, SEAL_NAME)
        storage.replace(path, json.dumps(asdict(seal), indent=1).encode(), f"{path}.tmp")
    except OSError as error:
        _logger.warning(f"cannot update the seal of {entry.path}, so every start reads all its files: {error}")
    return SealedEntry(entry.path, seal)


def _put_away(entry_path: str, fault: Exception) -> None:
    """Moves a damaged entry aside, or deletes it if it is a folder without a seal."""
    aside = f"{entry_path}.{uuid.uuid4().hex[:8]}.damaged"
    try:
        # The copy is deleted a day after its modification time.
        with suppress(OSError):
            os.utime(entry_path, follow_symlinks=False)
        os.rename(entry_path, aside)
    except OSError as error:
        if not is_wrong_path(error):
            raise
        raise UserError(f"{entry_path} is damaged and cannot be set aside: {error}; remove it") from error
    becomes = f"set aside in {aside} for a day"
    if isinstance(fault, UnsealedError):
        # Without a seal it may be incomplete, and a copy of all prepared data takes too much space to keep.
        _remove(aside)
        becomes = "deleted"
    said = printable(str(fault) or type(fault).__name__)
    _logger.warning(f"{said}: the prepared data are {becomes} and prepared again")


def _remove_abandoned(entry_path: str) -> None:
    """Removes killed attempts and entries that were set aside, once they are a day old."""
    cache_path, name = os.path.split(entry_path)
    for other in os.listdir(cache_path):
        if other.startswith(f"{name}."):
            path = os.path.join(cache_path, other)
            with suppress(OSError):  # Another job is removing it too, or it belongs to another user.
                if time.time() - os.lstat(path).st_mtime > _ABANDONED_SECONDS:
                    _remove(path)


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        os.remove(path)


def make_cache_folder(cache_path: str) -> str:
    """Creates the cache folder if it is missing, and returns its path.

    Raises:
        UserError: the folder is not local or cannot be created.
    """
    if "::" in cache_path:
        raise UserError(f"cache path {cache_path} must be a local folder, and `::` chains remote file systems")
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
        raise UserError(f"cache path {cache_path}: cannot create the folder: {error}") from error
    return str(path)


def _make_work_folder(entry_path: str) -> str:
    """Creates the temporary folder in which an entry is prepared."""
    work_path = f"{entry_path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        os.mkdir(work_path)
    except PermissionError as error:
        raise UserError(f"cache path {os.path.dirname(entry_path)}: permission denied: {error}") from error
    return work_path


def _commit(work_path: str, entry_path: str, ranks: Ranks) -> None:
    """Seals a prepared folder, with the files divided among the ranks, and renames it. Collective: every rank."""
    names = ranks.run_on_first(lambda: sorted(os.listdir(work_path)))
    mine = names[ranks.rank :: ranks.size]
    own_files = ranks.run_on_each(lambda: {name: seal_file(work_path, name) for name in mine})
    sealed = {name: file for files in ranks.all_gather(own_files) for name, file in files.items()}
    ranks.run_on_first(lambda: _finish(work_path, entry_path, Seal({name: sealed[name] for name in names})))


def _finish(work_path: str, entry_path: str, seal: Seal) -> None:
    """Writes the seal and renames the folder, unless another job has prepared the entry first."""
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
    """Raises RuntimeError on every rank if a rank does not see a path that rank 0 created. Collective: every rank."""
    error = None
    if not os.path.exists(path):
        error = RuntimeError(
            f"rank {ranks.rank} on {socket.gethostname()} does not see {path}, which rank 0 created: the "
            "cache folder must be on a file system that all ranks share"
        )
    ranks.fail_together(error)


def read_contents(path: str, kind: type[T]) -> T:
    """Returns the table of contents of an entry, the file `META_NAME`, as the given dataclass.

    Raises:
        ValueError: the file does not match the dataclass.
    """
    url = os.path.join(path, META_NAME)
    try:
        return parse(kind, json.loads(storage.read(url)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{url}: {error}") from error


def map_values(path: str, dtype: np.dtype[Any], num_values: int) -> NDArray[Any]:
    """Returns [num_values]: the memory-mapped contents of a file of an entry.

    Raises:
        RuntimeError: the file does not have the size it was written with.
    """
    size_bytes, expected = os.path.getsize(path), num_values * dtype.itemsize
    if size_bytes != expected:
        raise RuntimeError(
            f"{path} has {size_bytes} bytes instead of {expected}: remove the folder {os.path.dirname(path)}, and "
            "the next run prepares it again"
        )
    # An empty file cannot be memory-mapped. Indexing a plain array takes a tenth of the time that `np.memmap` takes.
    return np.memmap(path, dtype, mode="r").view(np.ndarray) if num_values else np.zeros(0, dtype)
