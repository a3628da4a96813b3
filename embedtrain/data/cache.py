"""Prepared data in a local folder: made once, under a name that says of what, and complete or not there."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from numpy.typing import NDArray

from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import UserError, is_wrong_path

_ABANDONED_SECONDS = 24 * 3600


def cached_entry(cache_path: str, name: str, complete_name: str, write: Callable[[str], None], ranks: Ranks) -> str:
    """Returns the path of an entry of the cache, which rank 0 writes unless it is there.

    It is written under another name and renamed when it is complete: one that was killed is done again.

    Collective: every rank.

    Args:
        cache_path: local folder, made if missing; all ranks must see the same one.
        name: of the entry; says of which data it is, so that other data make another.
        complete_name: a file that an entry holds if and only if it is complete; `write` writes it last.
        write: fills the folder it is given.

    Raises:
        UserError: on every rank; what `write` raises, or a cache folder that is not local or may not be written.
        RuntimeError: a rank does not see the cache folder of the others.
    """
    cache_path = ranks.run_on_first(lambda: make_cache_folder(cache_path))
    entry_path = os.path.join(cache_path, name)

    def make() -> None:
        if os.path.exists(os.path.join(entry_path, complete_name)):
            return
        work_path = make_work_folder(entry_path)
        try:
            write(work_path)
            commit_work(work_path, entry_path, complete_name)
        except BaseException:
            shutil.rmtree(work_path, ignore_errors=True)
            raise

    ranks.run_on_first(make)
    require_visible(os.path.join(entry_path, complete_name), ranks)
    return entry_path


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


def make_work_folder(entry_path: str) -> str:
    """Makes the folder of this attempt at an entry, and removes those that others abandoned."""
    cache_path, name = os.path.split(entry_path)
    for other in os.listdir(cache_path):
        path = os.path.join(cache_path, other)
        if other.startswith(f"{name}.") and time.time() - os.path.getmtime(path) > _ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)
    if os.path.isdir(entry_path):  # Without a table of contents: somebody removed part of it.
        shutil.rmtree(entry_path)
    work_path = f"{entry_path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        os.mkdir(work_path)
    except PermissionError as error:
        raise UserError(f"cache path {cache_path}: permission denied: {error}") from error
    return work_path


def commit_work(work_path: str, entry_path: str, complete_name: str) -> None:
    """Gives the folder of an attempt the entry's name; another job may have been first."""
    try:
        os.rename(work_path, entry_path)
    except OSError:
        if not os.path.exists(os.path.join(entry_path, complete_name)):
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


def read_contents(path: str, name: str, what: str) -> dict[str, Any]:
    """Returns the table of contents of a complete entry.

    Args:
        path: the entry.
        name: of the file that holds it, JSON.
        what: the entry ought to be, for the message.

    Raises:
        RuntimeError: the entry is not complete.
    """
    try:
        with open(os.path.join(path, name), encoding="utf-8") as file:
            contents: dict[str, Any] = json.load(file)
    except FileNotFoundError as error:
        raise RuntimeError(f"{path}: not a prepared {what}: it holds no {name}") from error
    return contents


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
