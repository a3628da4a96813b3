"""The copy of its data that a run keeps in its folder; `evaluate`, `recommend` and other commands read only this copy.

A table of contents lists each file with its size and checksum. It is written before the files and removed after them.
A file that it does not list belongs to the user and is never written or removed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Generic, TypeVar

import xxhash
from pydantic import Field

from embedtrain import storage
from embedtrain.data.seal import SEAL_NAME, FileName
from embedtrain.errors import CorruptCheckpointError, UserError
from embedtrain.schema import Count, SchemaError, parse

T = TypeVar("T")

KEPT_DATA_NAME = "kept_data"
"""Name of the kept data's folder inside a run folder."""

MAX_KEPT_BYTES = 256 << 20
"""Largest total size of the files that are copied to the run folder."""

_CONTENTS_NAME = "kept.json"
_TEMPORARY_NAME = f"{_CONTENTS_NAME}.tmp"
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class KeptData(Generic[T]):
    """Holds the data that a run kept in its folder.

    Attributes:
        path: local folder with the files of prepared data.
        facts: the facts that were kept with the files.
    """

    path: str
    facts: T


@dataclass(frozen=True)
class _File:
    """Records the size of a file as written, and its xxh3_128 checksum in hex."""

    bytes: Count
    xxh3: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{32}$")]


@dataclass(frozen=True)
class _Kept:
    files: dict[FileName, _File]
    facts: dict[str, Any]


def require_own(url: str) -> None:
    """Checks that all files in a folder of kept data can be attributed to a run.

    Raises:
        UserError: the folder holds files but no table of contents, or the table of contents is damaged.
    """
    names = set(storage.list_names(url)) - {_TEMPORARY_NAME}
    if names and _CONTENTS_NAME not in names:
        raise UserError(
            f"{url} holds files that no run has written, such as {min(names)}, and a run needs a folder of that name: "
            "move it away, or give another run.path"
        )
    _read_contents(url)


def keep(url: str, facts: Mapping[str, Any], entry_path: str | None, leave_out: frozenset[str] = frozenset()) -> None:
    """Replaces the kept facts and files of prepared data; see `RunFolder.keep_data`.

    Raises:
        UserError: a file of the user's has the name of a file that the run would write.
    """
    require_own(url)
    earlier = _read_contents(url)
    sources = {} if entry_path is None else _files_of(entry_path, leave_out | {SEAL_NAME})
    if sum(map(os.path.getsize, sources.values())) > MAX_KEPT_BYTES:
        facts, entry_path, sources = {}, None, {}
    own = set() if earlier is None else set(earlier.files)
    found = storage.list_files(url)
    if foreign := (set(sources) - own) & set(found):
        raise UserError(f"{url}/{min(foreign)} is not a file of this run, which needs the name: move it away")
    for name in sorted((own - set(sources)) & set(found)):
        storage.remove(storage.join(url, name))
    if entry_path is None and not facts:
        if earlier is not None:
            storage.remove(storage.join(url, _CONTENTS_NAME))
        storage.remove_empty_folder(url)
        return
    kept = _Kept({name: _file_at(path) for name, path in sorted(sources.items())}, dict(facts))
    if kept != earlier:
        storage.make_folder(url)
        content = json.dumps(asdict(kept), ensure_ascii=False).encode()
        storage.replace(storage.join(url, _CONTENTS_NAME), content, storage.join(url, _TEMPORARY_NAME))
    for name, path in sources.items():
        copy = storage.join(url, name)
        if _fault(copy, kept.files[name], found.get(name)) is not None:
            copy_file(path, copy)


def copy_file(path: str, url: str) -> None:
    """Copies a local file to a URL and replaces the file there."""
    # Remove first: writing through a link would overwrite the link's target.
    storage.remove(url)
    storage.write(url, _Chunks(path))


@contextmanager
def open_kept(url: str, kind: type[T]) -> Iterator[KeptData[T] | None]:
    """Yields the kept data; see `RunFolder.open_data`."""
    kept = _read_contents(url)
    if kept is None:
        yield None
        return
    try:
        facts = parse(kind, kept.facts)
    except SchemaError as error:
        raise _unreadable(url, error) from error
    if (local := storage.local_path(url)) is not None:
        _check(url, kept)
        yield KeptData(local, facts)
        return
    with tempfile.TemporaryDirectory(prefix="embedtrain-") as copy:
        for name in kept.files.keys() & storage.list_files(url).keys():
            storage.download(storage.join(url, name), os.path.join(copy, name))
        _check(copy, kept, url)
        yield KeptData(copy, facts)


def verify(url: str) -> bool:
    """Verifies the checksums of the kept data; returns whether there are any.

    Raises:
        UserError: the table of contents is damaged.
        CorruptCheckpointError: a file is missing or has changed.
    """
    kept = _read_contents(url)
    if kept is not None:
        _check(url, kept)
    return kept is not None


def _read_contents(url: str) -> _Kept | None:
    if _CONTENTS_NAME not in storage.list_files(url):
        return None
    try:
        return parse(_Kept, json.loads(storage.read(storage.join(url, _CONTENTS_NAME))))
    except (ValueError, RecursionError) as error:
        raise _unreadable(url, error) from error


def _unreadable(url: str, error: Exception) -> UserError:
    return UserError(
        f"{storage.join(url, _CONTENTS_NAME)} is damaged ({error}): remove {url}, and give the training command "
        "again, which writes it anew"
    )


def _check(url: str, kept: _Kept, shown: str | None = None) -> None:
    """Raises CorruptCheckpointError for the first missing or changed file; the message names it below `shown`."""
    sizes = storage.list_files(url)
    for name, file in kept.files.items():
        if (fault := _fault(storage.join(url, name), file, sizes.get(name))) is not None:
            raise CorruptCheckpointError(
                f"{storage.join(shown or url, name)} {fault}: bring it back, or give the training command again, which "
                "writes it anew"
            )


def _fault(url: str, file: _File, size: int | None) -> str | None:
    if size is None:
        return "is missing"
    if size != file.bytes:
        return f"has {size:,} bytes, {file.bytes:,} were written"
    return None if _checksum(url, size) == file.xxh3 else "is damaged: its checksum has changed since it was written"


def _files_of(entry_path: str, leave_out: frozenset[str]) -> dict[str, str]:
    return {entry.name: entry.path for entry in os.scandir(entry_path) if entry.name not in leave_out}


def _file_at(path: str) -> _File:
    size = os.path.getsize(path)
    return _File(size, _checksum(path, size))


def _checksum(url: str, size: int) -> str:
    digest, reader, buffer = xxhash.xxh3_128(), storage.RangeReader(url), memoryview(bytearray(min(size, _CHUNK_BYTES)))
    try:
        for start in range(0, size, _CHUNK_BYTES):
            length = reader.read_into(start, buffer[: min(_CHUNK_BYTES, size - start)])
            digest.update(buffer[:length])
    finally:
        reader.close()
    return digest.hexdigest()


class _Chunks:
    """Iterates over the content of a local file in chunks; can be iterated repeatedly."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __iter__(self) -> Iterator[bytes]:
        with open(self._path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
