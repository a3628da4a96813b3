"""Expanding a path (a file, a glob or a folder, on any fsspec URL) into the files to read."""

from __future__ import annotations

import difflib
import errno
import glob
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec
import fsspec.utils
import xxhash
from fsspec.implementations.local import LocalFileSystem

from embedtrain.data.codecs import COMPRESSED, MAGIC_BYTES, codec_of, without_compression
from embedtrain.errors import UserError

CHUNK_BYTES = 4 << 20
TEXT_SUFFIXES = (".txt", "")
"""What the names of a folder's texts end in; "" stands for a name without a suffix."""

_logger = logging.getLogger(__name__)

# Names of the fields, in different file systems, that change with a file's content.
_TIME_KEYS = frozenset({"mtime", "modified", "lastmodified", "last_modified", "last-modified"})
_HASH_KEYS = frozenset({"etag", "checksum", "crc", "md5", "md5hash", "content-md5", "sha"})
_NAMES_SHOWN = 3


@dataclass(frozen=True)
class Source:
    """Describes one file.

    Attributes:
        url: any fsspec URL; an absolute path for a local file.
        size_bytes: as stored, before decompression.
        identity: changes when the file does: its URL, its size, and what its file system tells about the
            version of its content (or a hash of the content, if it tells nothing).
        compression: the codec, detected from the file's first bytes; None for a plain file.
        can_seek: whether reading can start at any byte; false in archives and on some web servers.
    """

    url: str
    size_bytes: int
    identity: str
    compression: str | None = None
    can_seek: bool = True

    @property
    def is_divisible(self) -> bool:
        """Whether a part of the file can be read without the bytes before it."""
        return self.compression is None and self.can_seek


@dataclass
class _Found:
    """Collects the files that paths expand to, and the files left out, by reason."""

    files: dict[str, tuple[fsspec.AbstractFileSystem, dict[str, Any]]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    real_paths: dict[str, str] = field(default_factory=dict)

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out.setdefault(reason, []).append(name)


def take_sources(path: str | Sequence[str], suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Source]:
    """Returns the result of `expand_sources` and logs which files are read and which are left out."""
    found = _find(path, suffixes)
    sources = _sources(found)
    shown = _shown([source.url for source in sources])
    total_mb = sum(source.size_bytes for source in sources) / 1e6
    left_out = "".join(f"; left out {reason}: {_shown(names)}" for reason, names in found.left_out.items())
    _logger.info(f"reading {len(sources):,} files of {total_mb:,.1f} MB: {shown}{left_out}")
    return sources


def expand_sources(path: str | Sequence[str], suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Source]:
    """Expands a path into files.

    Folders and globs leave out hidden files: files with a name, or in a folder with a name, that begins with "." or
    "_", such as `_SUCCESS`. They also leave out empty files, pipes and devices. Symbolic links are followed. A file
    that is reached twice is listed once.

    Args:
        path: a file, a glob (`*.txt`, `folder/**/*.txt.gz`), a folder, or a list of them, on any fsspec URL,
            including chained ones. A folder stands for all files below it whose names end in one of `suffixes`.
        suffixes: suffixes, in either case, of the files taken from a folder; the suffix of a compression may follow.
            "" stands for names without a suffix, and for compressed files of any name.

    Returns:
        The files in the order of the paths, and sorted by name per path.

    Raises:
        UserError: a path does not exist, matches nothing or only empty files, is not readable, or has an unknown
            protocol; a symbolic link leads nowhere, in a circle, or to a folder that contains it.
    """
    return _sources(_find(path, suffixes))


def file_system_of(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Returns the file system of a path or URL, and the path inside it.

    `::` chains file systems, unless a local file or folder has exactly this name or matches the glob.

    Raises:
        UserError: the URL's protocol is unknown, or its package is not installed.
    """
    if "::" in path and (os.path.lexists(path) or (glob.has_magic(path) and any(glob.iglob(path, recursive=True)))):
        return LocalFileSystem(), os.path.abspath(path)
    with explained_path(path):
        fs, root = fsspec.core.url_to_fs(path)
    return fs, str(root)


def source_at(fs: fsspec.AbstractFileSystem, name: str, path: str) -> Source:
    """Returns the file `name` of the file system of `path`, without computing its identity."""
    info = fs.info(name)
    url, size = _url_of(fs, name, path), info["size"] or 0
    can_seek = not is_web(fs) and not _is_in_archive(url)
    return Source(url, size, "", codec_of(_head(fs, name)), can_seek)


def refuse_changes(path: str | Sequence[str], suffixes: tuple[str, ...], identities: Collection[str]) -> None:
    """Checks that the files of a path are the files from which the data were prepared.

    Args:
        path, suffixes: as in `expand_sources`.
        identities: identities of the files at preparation; see `Source.identity`.

    Raises:
        UserError: a file was changed, added or removed.
    """
    files = _find(path, suffixes).files
    changed = {_identity(fs, info, url)[1] for url, (fs, info) in files.items()} ^ set(identities)
    if changed:
        names = sorted({identity.partition(" size=")[0] for identity in changed})
        raise UserError(
            f"{', '.join(names)}: changed while the run trained on it. The run can be resumed if the examples are "
            "still the same; otherwise restore the file, or start a new run with another run.path"
        )


def suffix_of(name: str) -> str:
    """Returns the suffix of a file's name or URL in lower case, ignoring the suffix of a compression; "" if none.

    A suffix begins with a letter: `part-00000`, `text.00` and `news.en-00001-of-00100` have none.
    """
    links = name.split("::")
    suffix = os.path.splitext(without_compression(os.path.basename(links[_place_of_name(links)]).lower()))[1]
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9]*", suffix) else ""


def is_hidden(path: str) -> bool:
    """Returns whether any part of a relative path begins with "." or "_"."""
    return any(name.startswith((".", "_")) for name in path.split("/"))


def _find(path: str | Sequence[str], suffixes: tuple[str, ...]) -> _Found:
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise UserError("no path was given: expected a file, a glob or a folder")
    found = _Found()
    for one in paths:
        _expand(one, suffixes, found)
    return found


def _sources(found: _Found) -> list[Source]:
    sources = [_source(fs, info, url) for url, (fs, info) in found.files.items()]
    heads = _heads(found.files, sources)
    return [replace(source, compression=codec_of(heads[source.url])) for source in sources]


@contextmanager
def explained_path(path: str) -> Iterator[None]:
    """Turns any exception of a file system about a path into a UserError of one line that names the path.

    For an unusable path file systems raise exceptions of any type: a damaged archive, a URL without a host, a missing
    login.
    """
    try:
        yield
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: permission denied: {error}") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise  # The user cannot mend a failing disk, so its error is raised unchanged.
        is_clear = isinstance(error, OSError | ValueError | ImportError) and str(error)
        reason = " ".join(str(error).split()) if is_clear else repr(error)
        raise UserError(f"{path}: {reason}") from error


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _expand(path: str, suffixes: tuple[str, ...], found: _Found) -> None:
    with explained_path(path):
        fs, root = file_system_of(path)
        info = _info_or_none(fs, root)
        if info is not None and info["type"] == "file":
            chosen = [_facts(fs, info)]
        elif info is not None and info["type"] == "directory":
            chosen = list(_of_folder(fs, root, suffixes, found))
            if not chosen:
                expected = ", ".join(f"*{suffix}" if suffix else "names without a suffix" for suffix in suffixes)
                raise UserError(f"{path}: no file ({expected}) in this folder or below it; {_contents(fs, root)}")
            chosen = _with_content(fs, chosen, path, found)
        elif info is not None:
            raise UserError(f"{path} is a device, a pipe or a socket: give a file or a folder")
        elif fsspec.core.has_magic(root):
            chosen = list(_of_glob(fs, root, found))
            if not chosen:
                raise UserError(f"{path}: no file matches; {_surroundings(fs, root)}")
            chosen = _with_content(fs, chosen, path, found)
        else:
            raise UserError(f"{path}: no such file or folder; {_surroundings(fs, root)}")
        for one in sorted(chosen, key=lambda info: str(info["name"])):
            _add(fs, one, path, found)


def _with_content(
    fs: fsspec.AbstractFileSystem, chosen: Sequence[dict[str, Any]], path: str, found: _Found
) -> list[dict[str, Any]]:
    """Leaves out empty files, and pipes and devices, whose reading may block or never end."""
    full = []
    for info in chosen:
        if info["type"] != "file":
            found.leave_out(info["name"], "devices, pipes and sockets")
        elif (facts := _facts(fs, info))["size"] == 0:
            found.leave_out(info["name"], "empty files")
        else:
            full.append(facts)
    if not full:
        raise UserError(f"{path}: no file with any content; left out {_shown([info['name'] for info in chosen])}")
    return full


def _add(fs: fsspec.AbstractFileSystem, info: dict[str, Any], path: str, found: _Found) -> None:
    """Adds a file unless it was added before under another name."""
    url = _url_of(fs, info["name"], path)
    if isinstance(fs, LocalFileSystem):
        real = os.path.realpath(info["name"])
        if found.real_paths.setdefault(real, url) != url:
            found.leave_out(url, f"since it is the same file as {found.real_paths[real]}")
            return
    found.files.setdefault(url, (fs, info))


def _of_folder(
    fs: fsspec.AbstractFileSystem, root: str, suffixes: tuple[str, ...], found: _Found
) -> Iterator[dict[str, Any]]:
    for info in _files_below(fs, root):
        name = info["name"].removeprefix(root).lstrip("/")
        if is_hidden(name):
            found.leave_out(name, "hidden files")
        elif suffix_of(name) in suffixes or ("" in suffixes and name.lower().endswith(COMPRESSED)):
            yield info
        else:
            wanted = ", ".join(filter(None, suffixes))
            found.leave_out(name, f"files of other suffixes than {wanted}")


def _of_glob(fs: fsspec.AbstractFileSystem, pattern: str, found: _Found) -> Iterator[dict[str, Any]]:
    names = pattern.split("/")
    first_magic = next(number for number, name in enumerate(names) if fsspec.core.has_magic(name))
    root, asked = "/".join(names[:first_magic]), "/".join(names[first_magic:])
    if isinstance(fs, LocalFileSystem):
        depth = None if "**" in asked else len(names) - first_magic
        is_match = re.compile(fsspec.utils.glob_translate(pattern)).match
        matched = [info for info in _files_below(fs, root or "/", depth) if is_match(info["name"])]
    else:
        matched = [info for info in fs.glob(pattern, detail=True).values() if info["type"] == "file"]
    for info in matched:
        # A pattern with a hidden name includes hidden files.
        if is_hidden(info["name"].removeprefix(root).lstrip("/")) and not is_hidden(asked):
            found.leave_out(info["name"], "hidden files")
        else:
            yield info


def _files_below(fs: fsspec.AbstractFileSystem, root: str, depth: int | None = None) -> Iterator[dict[str, Any]]:
    """Yields a folder's files, `depth` levels deep, following local symbolic links.

    Local entries that are neither files nor folders get the type "other".
    """
    if isinstance(fs, LocalFileSystem):
        yield from _local_files(root, depth, (os.path.realpath(root),))
    else:
        yield from (info for info in fs.find(root, detail=True).values() if info["type"] == "file")


def _local_files(folder: str, depth: int | None, above: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        kind = _kind(entry)
        if kind != "directory":
            yield {"name": entry.path, "type": kind}
        elif depth is None or depth > 1:
            real = os.path.realpath(entry.path)
            if real in above:
                raise UserError(f"{entry.path}: a symbolic link to {real}, which is a folder that it lies in")
            yield from _local_files(entry.path, None if depth is None else depth - 1, (*above, real))


def _kind(entry: os.DirEntry[str]) -> str:
    """Returns the type after following all links: "file", "directory" or "other"."""
    try:
        if entry.is_dir():
            return "directory"
        # A broken or circular link counts as a file here; it is refused later if it is selected.
        return "file" if entry.is_file() or not os.path.exists(entry.path) else "other"
    except OSError:
        return "file"


def _facts(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of a listed file; for a local symbolic link, the facts of its target."""
    if not isinstance(fs, LocalFileSystem):
        return info
    path = info["name"]
    try:
        return dict(fs.info(path), mtime=os.stat(path).st_mtime)
    except OSError as error:
        _refuse_broken_link(path, error)
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path}: the file has vanished while the folder was listed") from error
        raise


def _info_or_none(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any] | None:
    try:
        return dict(fs.info(path))
    except OSError as error:
        if isinstance(fs, LocalFileSystem):
            _refuse_broken_link(path, error)
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            return None
        raise


def _refuse_broken_link(path: str, error: OSError) -> None:
    if not os.path.islink(path):
        return
    if error.errno == errno.ELOOP:
        raise UserError(f"{path}: a symbolic link to {os.readlink(path)}, which leads back to the link") from error
    if isinstance(error, FileNotFoundError):
        raise UserError(f"{path}: a symbolic link to {os.readlink(path)}, which does not exist") from error


def _url_of(fs: fsspec.AbstractFileSystem, name: str, path: str) -> str:
    """Returns the URL of a file below `path`, keeping the rest of a chained URL such as `zip://NAME::PATH`."""
    if isinstance(fs, LocalFileSystem):
        return name
    links = path.split("::")
    if len(links) == 1:
        return str(fs.unstrip_protocol(name))
    place = _place_of_name(links)
    protocol, separator, _ = links[place].rpartition("://")
    links[place] = name if name.startswith(protocol + separator) else f"{protocol}{separator}{name}"
    return "::".join(links)


def _place_of_name(links: Sequence[str]) -> int:
    """Returns the index of the part of a chained URL that names the file; parts before it say how to read it."""
    return next((number for number, link in enumerate(links) if "://" in link), len(links) - 1)


def _source(fs: fsspec.AbstractFileSystem, info: dict[str, Any], url: str) -> Source:
    size, identity = _identity(fs, info, url)
    can_seek = info["size"] is not None and not _is_in_archive(url) and _serves_ranges(fs, info["name"], size)
    return Source(url, size, identity, can_seek=can_seek)


def _identity(fs: fsspec.AbstractFileSystem, info: dict[str, Any], url: str) -> tuple[int, str]:
    """Returns a file's size, and a text that changes with the file."""
    told = {key.lower(): str(value) for key, value in info.items() if value is not None}
    version = {key: value for key, value in told.items() if key in _TIME_KEYS | _HASH_KEYS}
    size = info["size"]
    if size is None or not version:
        with explained_path(url):
            size, version = _hashed(fs, info["name"])
    return size, f"{url} size={size} {sorted(version.items())}"


def _hashed(fs: fsspec.AbstractFileSystem, path: str) -> tuple[int, dict[str, str]]:
    digest, size = xxhash.xxh3_128(), 0
    with fs.open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
            size += len(block)
    return size, {"xxh3": digest.hexdigest()}


def _is_in_archive(url: str) -> bool:
    """Returns whether a chained URL names a file within an archive."""
    first, _, rest = url.partition("::")
    return bool(rest) and "://" in first


def is_web(fs: fsspec.AbstractFileSystem) -> bool:
    """Returns whether the file system is a web server, which may not serve parts of files."""
    protocols = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    return "http" in protocols


def _serves_ranges(fs: fsspec.AbstractFileSystem, path: str, size: int) -> bool:
    if not is_web(fs):
        return True
    if size == 0:
        return False
    try:
        with fs.open(path, "rb", block_size=1, cache_type="none", size=size) as file:
            file.seek(size - 1)
            return len(file.read(1)) == 1
    except (ValueError, OSError):
        return False


def _heads(
    files: Mapping[str, tuple[fsspec.AbstractFileSystem, dict[str, Any]]], sources: Sequence[Source]
) -> dict[str, bytes]:
    """Returns the first bytes of files by URL; on object stores many requests run in parallel."""
    heads: dict[str, bytes] = {}
    together: dict[fsspec.AbstractFileSystem, list[Source]] = {}
    for source in sources:
        fs, info = files[source.url]
        if isinstance(fs, LocalFileSystem) or is_web(fs) or not source.can_seek:
            with explained_path(source.url):
                heads[source.url] = _head(fs, info["name"])
        elif source.size_bytes:
            together.setdefault(fs, []).append(source)
        else:
            heads[source.url] = b""
    for fs, of_fs in together.items():
        names = [files[source.url][1]["name"] for source in of_fs]
        ends = [min(source.size_bytes, MAGIC_BYTES) for source in of_fs]
        with explained_path(_shown([source.url for source in of_fs])):
            found = fs.cat_ranges(names, [0] * len(names), ends, on_error="raise")
        heads.update(zip((source.url for source in of_fs), found, strict=True))
    return heads


def _head(fs: fsspec.AbstractFileSystem, name: str) -> bytes:
    with fs.open(name, "rb", **({"block_size": 0} if is_web(fs) else {})) as file:
        head: bytes = file.read(MAGIC_BYTES)
    return head


def _surroundings(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Returns suggestions: similar names in the nearest existing folder."""
    name = os.path.basename(path)
    parent = os.path.dirname(path)
    while (info := _info_or_none(fs, parent)) is None or info["type"] != "directory":
        if parent == os.path.dirname(parent):
            return "nothing exists at the start of this path"
        name, parent = os.path.basename(parent), os.path.dirname(parent)
    close = difflib.get_close_matches(name, _names(fs, parent), n=3)
    if close:
        return f"did you mean {' or '.join(os.path.join(parent, match) for match in close)}?"
    return _contents(fs, parent)


def _contents(fs: fsspec.AbstractFileSystem, folder: str) -> str:
    names = _names(fs, folder)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{folder} holds {shown}" if names else f"{folder} is empty"


def _names(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    return sorted(os.path.basename(path.rstrip("/")) for path in fs.ls(folder, detail=False))
