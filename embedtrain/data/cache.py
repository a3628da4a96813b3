"""The cache of prepared data: folders that the ranks of a job make together, and that exist when complete."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import fsspec
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem

from embedtrain.distributed.collectives import raise_together
from embedtrain.distributed.runtime import rank_of
from embedtrain.errors import UserError

T = TypeVar("T")

META_NAME = "meta.json"
"""An entry's table of contents, written last."""

_ABANDONED_SECONDS = 24 * 3600


def make_cache_folder(cache_path: str) -> str:
    """Makes the cache's folder where it is missing, and returns its path without a protocol.

    Raises:
        UserError: it is not local, or cannot be made.
    """
    fs, path = fsspec.core.url_to_fs(cache_path)
    if not isinstance(fs, LocalFileSystem):
        raise UserError(
            f"cache path {cache_path}: expected a local folder, whose files can be memory-mapped, "
            f"got one on {fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]}"
        )
    try:
        os.makedirs(path, exist_ok=True)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cache path {cache_path}: the folder cannot be made: {error}") from error
    return str(path)


def make_work_folder(entry_path: str) -> str:
    """Makes the folder of this attempt, and removes those that others abandoned."""
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


def require_visible(path: str, group: dist.ProcessGroup | None) -> None:
    """Collective: raises on every rank when one does not see what rank 0 made."""
    error = None
    if not os.path.exists(path):
        error = RuntimeError(
            f"rank {rank_of(group)} on {socket.gethostname()} does not see {path}, which rank 0 made: the "
            "cache folder must be on a file system that all ranks share"
        )
    raise_together(error, group)


def on_every_rank(work: Callable[[], T], group: dist.ProcessGroup | None) -> T:
    """Collective: does each rank's share; a failure of one is raised on all, so that none waits for it."""
    try:
        result = work()
    except Exception as error:
        raise_together(error, group)
        raise
    raise_together(None, group)
    return result


def commit_entry(work_path: str, entry_path: str, meta: Mapping[str, Any]) -> None:
    """Writes the table of contents and gives the folder its final name; another job may have been first."""
    with open(os.path.join(work_path, META_NAME), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.rename(work_path, entry_path)
    except OSError:
        if not os.path.exists(os.path.join(entry_path, META_NAME)):
            raise
        shutil.rmtree(work_path, ignore_errors=True)
