"""Functions over fsspec that checkpoints and run folders need, for local disks, `memory://`, S3 and others.

Three features of fsspec are avoided. Cached listings hide the files of other processes. `exists` returns False when
the network fails. Renaming on object stores is a copy and a deletion.

A failed operation on a remote file system is retried, up to `MAX_TRIES` tries in total, after waits of 0.5, 1, 2 and
4 seconds. No try starts later than `MAX_RETRY_SECONDS` after the first. Missing or existing files and denied
permissions are results, not failures. Errors of a local disk are raised at once, because waiting does not help.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from embedtrain.errors import UserError, printable

T = TypeVar("T")

MAX_TRIES = 5
FIRST_WAIT_SECONDS = 0.5
MAX_RETRY_SECONDS = 120.0

_ANSWERS = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Errors that a retry would repeat."""

# Timeouts of one request. s3fs retries requests itself, so botocore's retries, which would multiply them, are off.
_S3_CLIENT = {"connect_timeout": 10, "read_timeout": 30, "retries": {"mode": "standard", "total_max_attempts": 1}}

_HELD_BYTES = 16 * 2**20
"""Bytes of a file written before the kernel is asked to start writing them to disk."""

_logger = logging.getLogger(__name__)

_NO_HARD_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


def join(url: str, name: str) -> str:
    """Returns the path of `name` inside the folder `url`."""
    return f"{url.rstrip('/')}/{name}"


_SECRET_OPTIONS = {"password", "token", "access_token", "api_key", "secret", "sig", "signature"}
_SECRET_OPTIONS |= {"x-amz-signature", "x-amz-security-token", "x-goog-signature"}
"""Names of query parameters of a URL whose values are secrets, including the parameters of signed URLs."""


def has_password(url: str) -> bool:
    """Returns whether a URL contains a password: `ftp://USER:PASSWORD@HOST`, or `?password=`, `?token=` and so on."""
    return shown(url) != url


def shown(url: str) -> str:
    """Returns a URL for messages and files, without its password or token."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    address, question, query = rest.partition("?")
    # A Redis password may contain a slash; nothing after the host contains an @.
    authority = address if scheme in ("redis", "rediss", "unix") else address.partition("/")[0]
    login, _, _ = authority.rpartition("@")
    if ":" in login:
        address = login.partition(":")[0] + address[len(login) :]
    options = [part for part in query.split("&") if part.partition("=")[0].lower() not in _SECRET_OPTIONS]
    return f"{scheme}://{address}{question if options else ''}{'&'.join(options)}"


def base_name(url: str) -> str:
    """Returns the last part of a path."""
    return url.rstrip("/").rpartition("/")[2]


def local_path(url: str) -> str | None:
    """Returns the path in the local file system, or None if the URL is remote."""
    filesystem, path = _locate(url)
    return path if isinstance(filesystem, LocalFileSystem) else None


def is_in_memory(url: str) -> bool:
    """Returns whether a path is in the memory of this process (`memory://`)."""
    return isinstance(_locate(url)[0], MemoryFileSystem)


def make_folder(url: str) -> list[str]:
    """Creates a folder and its missing parents, durably; no-op if it exists.

    Returns:
        The local folders that were created, innermost first.
    """
    filesystem, path = _locate(url)
    if not isinstance(filesystem, LocalFileSystem):
        _retry(filesystem, f"{shown(url)} could not be made", lambda: filesystem.makedirs(path, exist_ok=True))
        return []
    folder = Path(path)
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        _sync_folder(each.parent)
    return list(map(str, missing))


def list_files(url: str) -> dict[str, int]:
    """Returns name and size in bytes of each file in a folder; empty if the folder is missing."""
    return {name: int(entry["size"]) for name, entry in _entries(url).items() if entry["type"] == "file"}


def list_folders(url: str) -> list[str]:
    """Returns the names of the folders in a folder; empty if it is missing."""
    return [name for name, entry in _entries(url).items() if entry["type"] == "directory"]


def list_names(url: str) -> list[str]:
    """Returns the names of all entries of a folder; empty if it is missing."""
    return list(_entries(url))


def oddity(url: str) -> str | None:
    """Describes a local path that is not a plain file: "a folder", "a link to X", "a pipe" and so on.

    None for a plain file, a missing file, and on remote file systems.
    """
    path = local_path(url)
    try:
        mode = None if path is None else os.lstat(path).st_mode
    except OSError:
        mode = None
    if path is None or mode is None or stat.S_ISREG(mode):
        return None
    return f"a link to {printable(os.readlink(path))}" if stat.S_ISLNK(mode) else _kind(mode)


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def require_folder(url: str) -> None:
    """Checks that a local path is a folder or does not exist.

    Raises:
        UserError: the path is a file, a pipe, or a link to one of these or to nothing.
    """
    path = local_path(url)
    if path is None or os.path.isdir(path) or not os.path.lexists(path):
        return
    reason = "not a folder" if os.path.exists(path) else "which does not exist"
    raise UserError(f"{url} is {oddity(url) or 'a file'}, {reason}; give another path")


def free_bytes(url: str) -> int | None:
    """Returns the free bytes of the disk of a folder, or None if the file system does not report them."""
    path = local_path(url)
    if path is None:
        return None
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize


def write(url: str, chunks: Iterable[bytes | memoryview]) -> None:
    """Writes a file chunk by chunk; on a local disk the file and its name are durable on return.

    A failure can leave a partial file on any file system, so the name must be one that is not read before a commit.
    Large files are written to disk continuously and dropped from the page cache, to save memory and the time of
    allocating pages.

    Args:
        url: the file.
        chunks: its bytes. If they can be iterated again (a list, not a generator), a failed write to a remote file
            system is retried.
    """
    filesystem, path = _locate(url)
    is_local = isinstance(filesystem, LocalFileSystem)

    def write_once() -> None:
        with filesystem.open(path, "wb") as file:
            num_held = 0
            for chunk in chunks:
                file.write(chunk)
                num_held += len(chunk)
                if is_local and num_held >= _HELD_BYTES:
                    file.flush()
                    _send_to_disk(file.fileno())
                    num_held = 0
            if is_local:
                file.flush()
                os.fsync(file.fileno())

    if iter(chunks) is chunks:
        write_once()
    else:
        _retry(filesystem, f"{shown(url)} could not be written", write_once)
    if is_local:
        _sync_folder(Path(path).parent)


@contextmanager
def new_file(url: str) -> Iterator[BinaryIO]:
    """Opens a new file; on a local disk the file and its name are durable when the block ends.

    As in `write`, a failure can leave a partial file.
    """
    filesystem, path = _locate(url)
    is_local = isinstance(filesystem, LocalFileSystem)
    with filesystem.open(path, "wb") as file:
        yield file
        if is_local:
            file.flush()
            os.fsync(file.fileno())
    if is_local:
        _sync_folder(Path(path).parent)


def create(url: str, data: bytes, temporary_url: str) -> None:
    """Creates a file atomically, and never replaces another file.

    A local file is written under the temporary name, made durable and linked. A remote file is one exclusive put.

    Raises:
        FileExistsError: the file exists with other content.
    """
    filesystem, path = _locate(url)
    try:
        if isinstance(filesystem, LocalFileSystem):
            _create_local(path, data, temporary_url)
        else:
            failure = f"{shown(url)} could not be created"
            _retry(filesystem, failure, lambda: filesystem.pipe_file(path, data, mode="create"))
    except FileExistsError:
        # A retried request, or a link over NFS, can fail because its first try succeeded.
        if read(url) != data:
            raise


def replace(url: str, data: bytes, temporary_url: str) -> None:
    """Replaces a small file atomically; the new content is not durable at once."""
    filesystem, path = _locate(url)
    if not isinstance(filesystem, LocalFileSystem):
        _retry(filesystem, f"{shown(url)} could not be written", lambda: filesystem.pipe_file(path, data))
        return
    temporary_path = _locate(temporary_url)[1]
    # A leftover of a killed process, or a link, which would redirect the write.
    with suppress(FileNotFoundError):
        os.unlink(temporary_path)
    try:
        with open(temporary_path, "xb") as file:
            file.write(data)
        os.replace(temporary_path, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary_path)


def read(url: str) -> bytes:
    """Returns a whole file; FileNotFoundError if it is missing.

    Raises:
        UserError: the path is a local folder, pipe, socket or device, whose reading might never end.
    """
    filesystem, path = _locate(url)
    if isinstance(filesystem, LocalFileSystem) and not stat.S_ISREG(mode := os.stat(path).st_mode):
        raise UserError(f"{shown(url)} is {_kind(mode)}, not a file")
    return bytes(_retry(filesystem, f"{shown(url)} could not be read", lambda: filesystem.cat_file(path)))


def read_lines(url: str) -> Iterator[bytes]:
    """Yields the lines of a file, line ends included; streams a local file. Raises the same errors as `read`."""
    filesystem, path = _locate(url)
    if isinstance(filesystem, LocalFileSystem) and stat.S_ISREG(os.stat(path).st_mode):
        with open(path, "rb") as file:
            yield from file
    else:
        yield from BytesIO(read(url))


class RangeReader:
    """Reads ranges of one file, and keeps it open, so that the kernel reads ahead for sequential ranges.

    Args:
        url: the file.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._filesystem, self._path = _locate(url)
        self._file: FileIO | None = None

    def read_into(self, start: int, destination: memoryview) -> int:
        """Fills `destination` with the file's bytes from `start`; returns the number of bytes read."""
        if not isinstance(self._filesystem, LocalFileSystem):
            data = _retry(self._filesystem, f"{self._url} could not be read", lambda: self._fetch(start, destination))
            destination[: len(data)] = data
            return len(data)
        if self._file is None:
            self._file = FileIO(self._path)
        self._file.seek(start)
        filled = 0
        while filled < len(destination) and (count := self._file.readinto(destination[filled:])):
            filled += count
        return filled

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _fetch(self, start: int, destination: memoryview) -> bytes:
        return bytes(self._filesystem.cat_file(self._path, start=start, end=start + len(destination)))


def download(url: str, path: str) -> None:
    """Copies a file to a local path."""
    filesystem, remote_path = _locate(url)
    _retry(filesystem, f"{shown(url)} could not be read", lambda: filesystem.get_file(remote_path, path))


def remove(url: str) -> None:
    """Removes a file, durably on a local disk; no-op if it is missing."""
    filesystem, path = _locate(url)
    with suppress(FileNotFoundError):
        _retry(filesystem, f"{shown(url)} could not be removed", lambda: filesystem.rm_file(path))
        if isinstance(filesystem, LocalFileSystem):
            _sync_folder(Path(path).parent)


def remove_empty_folder(url: str) -> None:
    """Removes a folder if it is empty; otherwise, and on object stores, which have no folders, a no-op."""
    filesystem, path = _locate(url)
    with suppress(OSError):
        filesystem.rmdir(path)


def _locate(url: str) -> tuple[Any, str]:
    options: dict[str, Any] = {}
    if url.startswith(("s3://", "s3a://")) and "config_kwargs" not in fsspec.config.conf.get("s3", {}):
        options["config_kwargs"] = _S3_CLIENT
    try:
        filesystem, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except (ValueError, ImportError) as error:
        raise UserError(f"{shown(url)!r} is not a path that can be opened: {error}") from error
    return filesystem, str(path)


def _retry(filesystem: Any, failure: str, action: Callable[[], T]) -> T:
    """Runs an action on a file system, with the retries that the module's docstring describes.

    Raises:
        OSError: every try failed; the message begins with `failure` and gives the number of tries.
    """
    if isinstance(filesystem, LocalFileSystem):
        return action()
    began = time.monotonic()
    wait = FIRST_WAIT_SECONDS
    for number in range(1, MAX_TRIES + 1):
        try:
            return action()
        except _ANSWERS:
            raise
        except Exception as error:
            # Client libraries also raise their own exception classes.
            seconds = time.monotonic() - began
            text = f"{type(error).__name__}: {error}"
            if number == MAX_TRIES or seconds + wait > MAX_RETRY_SECONDS:
                raise OSError(f"{failure} in {number} tries over {seconds:.1f} s: {text}") from error
            _logger.warning(f"{failure}, trying again in {wait:g} s: {text}")
        time.sleep(wait)
        wait *= 2
    raise AssertionError("the last try returns or raises")


def _entries(url: str) -> dict[str, dict[str, Any]]:
    filesystem, path = _locate(url)

    def list_anew() -> Any:
        filesystem.invalidate_cache()
        return filesystem.ls(path, detail=True)

    try:
        entries = _retry(filesystem, f"{shown(url)} could not be listed", list_anew)
    except FileNotFoundError:
        return {}
    except NotADirectoryError as error:
        what = "is" if os.path.lexists(path) else "lies below"
        raise UserError(f"{shown(url)} {what} a file, not a folder; give another path") from error
    # An object store may list the folder itself, as an empty marker object.
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
            # Without hard links, renaming is atomic too, but of two simultaneous writers the later one wins.
            if os.path.exists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
            os.rename(temporary_path, path)
        folder = Path(path).parent
        _sync_folder(folder)
        _sync_folder(folder.parent)
    finally:
        with suppress(OSError):
            os.unlink(temporary_path)


def _send_to_disk(descriptor: int) -> None:
    """Asks the kernel to write a file's cached pages to disk and to drop the written ones; does not wait."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
