"""Thin functions over fsspec: what a checkpoint needs of a local disk, `memory://`, S3 and the like.

Three habits of fsspec are kept out here. Listings are never taken from a cache, which hides the files of
other processes. `exists` is not used: it answers False when the network fails. Renaming is not used: on
object stores it is a copy and a deletion.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from embedtrain.errors import UserError

_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def join(url: str, name: str) -> str:
    """Returns the path of `name` inside the folder `url`."""
    return f"{url.rstrip('/')}/{name}"


def base_name(url: str) -> str:
    """Returns the last part of a path."""
    return url.rstrip("/").rpartition("/")[2]


def local_path(url: str) -> str | None:
    """Returns the path that the operating system knows, or None where the file is not on its disks."""
    filesystem, path = _locate(url)
    return path if isinstance(filesystem, LocalFileSystem) else None


def make_folder(url: str) -> None:
    """Makes a folder and its missing parents, durably; nothing where it exists."""
    filesystem, path = _locate(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.makedirs(path, exist_ok=True)
        return
    folder = Path(path)
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        _sync_folder(each.parent)


def list_files(url: str) -> dict[str, int]:
    """Returns the name and size in bytes of each file in a folder; empty where the folder is missing."""
    return {name: int(entry["size"]) for name, entry in _entries(url).items() if entry["type"] == "file"}


def list_folders(url: str) -> list[str]:
    """Returns the names of the folders in a folder; empty where it is missing."""
    return [name for name, entry in _entries(url).items() if entry["type"] == "directory"]


def free_bytes(url: str) -> int | None:
    """Returns how much the disk below a folder still takes, or None where the file system does not tell."""
    path = local_path(url)
    if path is None:
        return None
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def write(url: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file chunk by chunk; on a local disk it is durable, its name included, on return.

    A failure can leave a part of the file behind, on any file system: only a name that nobody reads
    before a commit is safe here.
    """
    filesystem, path = _locate(url)
    with filesystem.open(path, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        if isinstance(filesystem, LocalFileSystem):
            file.flush()
            os.fsync(file.fileno())
    if isinstance(filesystem, LocalFileSystem):
        _sync_folder(Path(path).parent)


def create(url: str, data: bytes, temporary_url: str) -> None:
    """Creates a file that is there whole or not at all, and never replaces another.

    A local file is written under the temporary name, made durable and linked. Elsewhere it is one
    exclusive put.

    Raises:
        FileExistsError: the name is taken, by other content than `data`.
    """
    filesystem, path = _locate(url)
    try:
        if isinstance(filesystem, LocalFileSystem):
            _create_local(path, data, temporary_url)
        else:
            filesystem.pipe_file(path, data, mode="create")
    except FileExistsError:
        # A request that was retried, or a link over NFS, can fail on its own success.
        if read(url) != data:
            raise


def read(url: str) -> bytes:
    """Returns a whole file; FileNotFoundError where it is missing."""
    filesystem, path = _locate(url)
    return bytes(filesystem.cat_file(path))


def read_into(url: str, start: int, destination: memoryview) -> int:
    """Fills `destination` with a file's bytes from `start` on; returns how many there were."""
    filesystem, path = _locate(url)
    if not isinstance(filesystem, LocalFileSystem):
        data = filesystem.cat_file(path, start, start + len(destination))
        destination[: len(data)] = data
        return len(data)
    filled = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while filled < len(destination) and (count := file.readinto(destination[filled:])):
            filled += count
    return filled


def download(url: str, path: str) -> None:
    """Copies a file to a local path."""
    filesystem, remote_path = _locate(url)
    filesystem.get_file(remote_path, path)


def remove(url: str) -> None:
    """Removes a file, durably on a local disk; nothing where it is missing."""
    filesystem, path = _locate(url)
    with suppress(FileNotFoundError):
        filesystem.rm_file(path)
        if isinstance(filesystem, LocalFileSystem):
            _sync_folder(Path(path).parent)


def remove_empty_folder(url: str) -> None:
    """Removes a folder where there is one and nothing is in it; object stores have none."""
    filesystem, path = _locate(url)
    with suppress(OSError):
        filesystem.rmdir(path)


def _locate(url: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except (ValueError, ImportError) as error:
        raise UserError(f"{url!r} is not a path that can be opened: {error}") from error
    return filesystem, str(path)


def _entries(url: str) -> dict[str, dict[str, Any]]:
    filesystem, path = _locate(url)
    filesystem.invalidate_cache()
    try:
        entries = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    except NotADirectoryError as error:
        raise UserError(f"{url} is a file, not a folder") from error
    # An object store can list the folder itself, as an empty object that marks it.
    return {base_name(entry["name"]): entry for entry in entries if entry["name"].rstrip("/") != path.rstrip("/")}


def _create_local(path: str, data: bytes, temporary_url: str) -> None:
    temporary_path = _locate(temporary_url)[1]
    try:
        write(temporary_url, [data])
        try:
            os.link(temporary_path, path)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            # Without hard links: as atomic, but of two writers at the same instant the later one wins.
            if os.path.exists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
            os.rename(temporary_path, path)
        folder = Path(path).parent
        _sync_folder(folder)
        _sync_folder(folder.parent)
    finally:
        with suppress(OSError):
            os.unlink(temporary_path)


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
