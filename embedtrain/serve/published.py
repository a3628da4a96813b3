"""Reads publications of `embedtrain publish`. This file can be copied and does not need embedtrain.

    from published import Mirror, RedisRows

    mirror = Mirror("s3://bucket/vectors")        # a folder; needs fsspec, pyarrow and NumPy
    mirror.update()                               # reads the newest version; later calls read only changes
    vectors = mirror.vectors("item", ["a", "b"])  # [2, dim]; NaN for a name that has no row

    rows = RedisRows("redis://localhost:6379/0")  # Redis; needs redis and NumPy
    vectors, number = rows.vectors("item", ["a", "b"])

Each call returns data of a single version.
"""

from __future__ import annotations

import json
import os
import re
import struct
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

import numpy as np
from numpy.typing import NDArray

FORMAT, VERSION = "embedtrain publication", 1
PREFIX = "embedtrain"
"""Default prefix of the keys in Redis; `?prefix=NAME` in the URL sets another."""
PASSWORD_VARIABLE = "EMBEDTRAIN_REDIS_PASSWORD"
"""Environment variable that holds the password of Redis, if it needs one."""
CHUNK_BYTES = 64 << 20
"""Size of the chunks of a file in Redis, whose values are limited to 512 MiB."""
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 60.0
"""Timeouts of Redis: for connecting, and for each answer."""

_EXPECTED_URL = "expected redis://HOST:PORT/DATABASE?prefix=NAME"
_MANIFEST = re.compile(r"version-(\d{9,})\.json")
_ENTRY = struct.Struct("<QI")
_TRIES = 5

Vectors = NDArray[np.float32]


class Gone(LookupError):
    """The version being read was deleted; open the newest version instead."""


@dataclass(frozen=True)
class Part:
    """Holds the changes of a table in one version.

    Attributes:
        number: number of the version.
        names: [n]; names of added or changed rows.
        vectors: [n, dim] float32; their vectors.
        deleted: names of deleted rows.
        is_whole: whether `names` are all rows of the table in this version.
    """

    number: int
    names: list[str]
    vectors: Vectors
    deleted: list[str]
    is_whole: bool


class Version:
    """One version of a folder. Its files never change; they are deleted after some later versions are written.

    Attributes:
        number: number of the version, from 1.
        manifest: contents of its manifest file.
    """

    def __init__(self, file_system: Any, path: str, manifest: Mapping[str, Any]) -> None:
        self.manifest = manifest
        self.number = int(manifest["number"])
        self._file_system, self._path = file_system, path

    @property
    def step(self) -> int:
        """The training step of the checkpoint that was published."""
        return int(self.manifest["step"])

    @property
    def tables(self) -> list[str]:
        """The names of the tables."""
        return list(self.manifest["tables"])

    def changes(self, table: str, since: int | None = None) -> Iterator[Part]:
        """Yields the changes between version `since` and this version, in order; a whole part replaces all rows.

        Args:
            table: name of the table.
            since: number of an earlier version; None to start from an empty table.

        Raises:
            ValueError: there is no such table, or `since` is newer than this version.
            Gone: this version was deleted.
        """
        facts = self._table(table)
        if since is not None and since > self.number:
            raise ValueError(
                f"since={since} must not be newer than this version of {self._path}, which is {self.number}"
            )
        parts = facts["parts"]
        if since is not None and since >= parts[0]["number"]:
            parts = [part for part in parts if part["number"] > since]
        for part in parts:
            names, vectors = self._rows(part["rows"], facts["dim"])
            deleted = [] if part["deleted"] is None else self._read(part["deleted"])["name"].to_pylist()
            yield Part(part["number"], names, vectors, deleted, part["is_whole"])

    def dense(self) -> dict[str, NDArray[Any]]:
        """Returns the parameters of the dense network by name; empty if the model has none."""
        entry = self.manifest["dense"]
        return {} if entry is None else read_dense(self._bytes(entry["file"]))

    def _table(self, table: str) -> Mapping[str, Any]:
        if table not in self.manifest["tables"]:
            raise ValueError(f"{self._path} has no table {table!r}; it has {', '.join(self.tables)}")
        facts: Mapping[str, Any] = self.manifest["tables"][table]
        return facts

    def _rows(self, file: str | None, dim: int) -> tuple[list[str], Vectors]:
        if file is None:
            return [], np.empty((0, dim), np.float32)
        found = self._read(file)
        values = found["vector"].combine_chunks().flatten() if len(found) else []
        return found["name"].to_pylist(), np.asarray(values, np.float32).reshape(-1, dim)

    def _read(self, file: str) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        return pq.read_table(pa.BufferReader(self._bytes(file)))

    def _bytes(self, file: str) -> bytes:
        try:
            data = bytes(self._file_system.cat_file(f"{self._path}/{file}"))
        except FileNotFoundError as error:
            raise Gone(f"version {self.number} of {self._path} was deleted: open the newest version") from error
        if len(data) != self.manifest["files"][file]:
            raise ValueError(
                f"{self._path}/{file} is damaged: it has {len(data):,} bytes, not {self.manifest['files'][file]:,}"
            )
        return data


class Folder:
    """Opens versions of a folder that `embedtrain publish` writes.

    Args:
        url: any fsspec URL.
        options: options of its fsspec file system.
    """

    def __init__(self, url: str, **options: Any) -> None:
        import fsspec

        self._file_system, self._path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)

    def numbers(self) -> list[int]:
        """Returns the numbers of the available versions, in ascending order."""
        try:
            self._file_system.invalidate_cache()
            names = self._file_system.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        return version_numbers([name.rpartition("/")[2] for name in names])

    def open(self, number: int | None = None) -> Version:
        """Opens version `number`, or the newest version if it is None.

        Raises:
            ValueError: the version does not exist, or has a newer format.
            Gone: the version was deleted.
        """
        found = self.numbers()
        if not found:
            raise ValueError(f"{self._path} holds no publication yet")
        if number is not None and number > found[-1]:
            raise ValueError(f"{self._path} has no version {number} yet: the newest is {found[-1]}")
        number = found[-1] if number is None else number
        name = manifest_name(number)
        try:
            data = self._file_system.cat_file(f"{self._path}/{name}")
        except FileNotFoundError as error:
            raise Gone(f"version {number} of {self._path} was deleted: open the newest version") from error
        return Version(self._file_system, self._path, read_manifest(data, f"{self._path}/{name}"))


class Mirror:
    """Keeps the rows of the newest version of a folder in memory. Threads may read while another thread updates.

    Args:
        url: any fsspec URL.
        options: options of its fsspec file system.

    Attributes:
        version: the version whose rows are held; None before the first `update`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.version: Version | None = None
        self._folder = Folder(url, **options)
        self._tables: dict[str, _Rows] = {}
        self._lock = threading.Lock()

    def update(self) -> bool:
        """Reads the changes since the last call; returns whether there is a newer version.

        Raises:
            ValueError: nothing is published, or the version has a newer format.
            Gone: several times in a row, the newest version was deleted while it was being read.
        """
        for last in range(_TRIES):
            try:
                return self._update()
            except Gone:
                if last == _TRIES - 1:
                    raise
        raise AssertionError("the last try returns or raises")

    def vectors(self, table: str, names: Sequence[str]) -> Vectors:
        """Returns the vectors [n, dim] of names; NaN for a name that has no row."""
        with self._lock:
            return self._rows_of(table).vectors(names)

    def names(self, table: str) -> list[str]:
        """Returns the names that have a row."""
        with self._lock:
            return list(self._rows_of(table).places)

    def _rows_of(self, table: str) -> _Rows:
        if table not in self._tables:
            raise ValueError(
                f"there is no table {table!r}; there are {', '.join(self._tables) or 'none yet: call update()'}"
            )
        return self._tables[table]

    def _update(self) -> bool:
        newest, known = self._folder.open(), self.version
        is_same = known is not None and known.manifest["id"] == newest.manifest["id"]
        since = known.number if known is not None and is_same else None
        if since == newest.number:
            return False
        # Everything is read before anything is applied, because reading fails if a file was deleted.
        read = {table: list(newest.changes(table, since if table in self._tables else None)) for table in newest.tables}
        with self._lock:
            self._tables = {
                table: self._tables.get(table, _Rows(facts["dim"])).applied(read[table], facts["dim"])
                for table, facts in newest.manifest["tables"].items()
            }
            self.version = newest
        return True


class _Rows:
    """Holds the rows of a table by name."""

    def __init__(self, dim: int) -> None:
        self.places: dict[str, int] = {}
        self._rows: Vectors = np.empty((0, dim), np.float32)
        self._free: list[int] = []

    def applied(self, parts: Sequence[Part], dim: int) -> _Rows:
        """Applies changes and returns the rows: this object, or a new one if all rows are replaced."""
        rows = self
        for part in parts:
            rows = _Rows(dim) if part.is_whole else rows
            rows._apply(part)
        return rows

    def vectors(self, names: Sequence[str]) -> Vectors:
        places = np.array([self.places.get(name, -1) for name in names], np.int64)
        found = np.full((len(places), self._rows.shape[1]), np.nan, np.float32)
        found[places >= 0] = self._rows[places[places >= 0]]
        return found

    def _apply(self, part: Part) -> None:
        self._free += [self.places.pop(name) for name in part.deleted if name in self.places]
        new = [name for name in part.names if name not in self.places]
        used = len(self.places) + len(self._free)
        missing = used + len(new) - len(self._free) - len(self._rows)
        if missing > 0:
            room = np.empty((max(missing, len(self._rows) // 2), self._rows.shape[1]), np.float32)
            self._rows = np.concatenate([self._rows, room])
        taken = [self._free.pop() for _ in range(min(len(new), len(self._free)))]
        self.places.update(zip(new, [*taken, *range(used, used + len(new) - len(taken))], strict=True))
        self._rows[[self.places[name] for name in part.names]] = part.vectors


class RedisRows:
    """Reads the rows that `embedtrain publish` writes to Redis.

    Args:
        url: `redis://HOST:PORT/DATABASE`, with `?prefix=NAME` if it was published with one.
        options: options of `redis.Redis`; the password defaults to the variable `EMBEDTRAIN_REDIS_PASSWORD`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._redis, self._prefix = connect(url, **options)

    def vectors(self, table: str, names: Sequence[str]) -> tuple[Vectors, int]:
        """Returns the vectors [n, dim] of names, NaN for a name without a row, and the number of the version.

        Raises:
            ValueError: nothing is published, there is no such table, or the version has a newer format.
        """
        with self._redis.pipeline(transaction=True) as pipeline:
            pipeline.get(f"{self._prefix}:head")
            if names:
                pipeline.mget(row_keys(self._prefix, table, names))
            data, *values = pipeline.execute()
        head = self._head(data)
        if table not in head["tables"]:
            raise ValueError(f"{self._prefix} has no table {table!r}; it has {', '.join(head['tables'])}")
        found = np.full((len(names), head["tables"][table]["dim"]), np.nan, np.float32)
        for place, value in enumerate(values[0] if names else []):
            row = committed(value, head["number"])
            if row is not None:
                found[place] = np.frombuffer(row, "<f4")
        return found, int(head["number"])

    def dense(self) -> tuple[dict[str, NDArray[Any]], int]:
        """Returns the parameters of the dense network by name, and the number of the version.

        Raises:
            ValueError: nothing is published, or the version has a newer format.
            Gone: several times in a row, the network was replaced while it was being read.
        """
        for _ in range(_TRIES):
            head = self._head(self._redis.get(f"{self._prefix}:head"))
            if head["dense"] is None:
                return {}, int(head["number"])
            data = read_chunks(self._redis, self._prefix, head["dense"]["file"])
            if data is not None:
                return read_dense(data), int(head["number"])
        raise Gone(f"{self._prefix}: the network was replaced during each of {_TRIES} attempts to read it: try again")

    def _head(self, data: bytes | None) -> dict[str, Any]:
        if data is None:
            raise ValueError(f"{self._prefix} holds no publication yet")
        return read_manifest(data, f"{self._prefix}:head")


def version_numbers(names: Iterable[str]) -> list[int]:
    """Returns the version numbers of the manifests among the file names of a folder, in ascending order."""
    return sorted(int(found[1]) for name in names if (found := _MANIFEST.fullmatch(name)))


def manifest_name(number: int) -> str:
    """Returns the name of a version's manifest; the version exists when this file exists."""
    return f"version-{number:09d}.json"


def read_manifest(data: bytes, where: str) -> dict[str, Any]:
    """Returns the manifest of a version; ValueError if it is not a manifest or has a newer format."""
    try:
        manifest: dict[str, Any] = json.loads(data)
        found, version = manifest["format"], manifest["format_version"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{where} is not the manifest of a publication") from error
    if found != FORMAT or version > VERSION:
        raise ValueError(
            f"{where} has format version {version}, and this program reads versions up to {VERSION}: use a newer one"
        )
    return manifest


def read_dense(data: bytes) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a safetensors file of float32 tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return {
        name: np.frombuffer(data[8 + size :], "<f4")[entry["data_offsets"][0] // 4 : entry["data_offsets"][1] // 4]
        .reshape(entry["shape"])
        .copy()
        for name, entry in header.items()
    }


def split_prefix(url: str) -> tuple[str, str]:
    """Returns a Redis URL without `?prefix=NAME`, and the prefix."""
    address, _, query = url.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    prefix = options.pop("prefix", PREFIX)
    return address + (f"?{urlencode(options)}" if options else ""), prefix


def connect(url: str, **options: Any) -> tuple[Any, str]:
    """Returns a Redis client, which connects on first use, and the prefix of the keys.

    Raises:
        ValueError: the URL is invalid; the message contains no part of it that may be a password.
    """
    import redis

    address, prefix = split_prefix(url)
    parameters = dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))
    if empty := [name for name, value in parameters.items() if not value]:
        raise ValueError(f"parameter {empty[0]!r} has no value: {_EXPECTED_URL}")
    usual: dict[str, Any] = {"socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": ANSWER_SECONDS}
    if password := os.environ.get(PASSWORD_VARIABLE):
        usual["password"] = password  # A password in the URL takes precedence.
    try:
        client = redis.Redis.from_url(address, **{**usual, **options})
    except ValueError:
        raise ValueError(_EXPECTED_URL) from None
    if not url.startswith("unix:") and re.fullmatch("/?[0-9]*", urlsplit(address).path) is None:
        raise ValueError(f"the database must be a number: {_EXPECTED_URL}")
    pool = client.connection_pool
    try:
        # Constructing a connection refuses unknown parameters without connecting.
        pool.connection_class(**pool.connection_kwargs)
    except TypeError as error:
        if unknown := [name for name in parameters if f"{name!r}" in str(error)]:
            raise ValueError(
                f"parameter {unknown[0]!r} is unknown to redis-py (embedtrain adds 'prefix'): {_EXPECTED_URL}"
            ) from error
        raise
    return client, prefix


def chunk_keys(prefix: str, file: str) -> list[str]:
    """Returns the Redis keys of a file's chunks; the file's name ends with their number."""
    return [f"{prefix}:{file}:{place}" for place in range(int(file.rpartition(":")[2]))]


def read_chunks(client: Any, prefix: str, file: str) -> bytes | None:
    """Returns the bytes of a file in Redis; None if a chunk is missing."""
    chunks = []
    for key in chunk_keys(prefix, file):
        chunk = client.get(key)
        if chunk is None:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def row_keys(prefix: str, table: str, names: Iterable[str]) -> list[str]:
    """Returns the Redis keys of rows."""
    start = f"{prefix}:row:{quote(table, safe='')}:"
    return [start + name for name in names]


def committed(value: bytes | None, number: int) -> bytes | None:
    """Returns the row that a Redis value holds at version `number`; None if the row is deleted or unknown.

    A value is a list of entries; the newest entry that is not newer than `number` counts.
    """
    at = 0
    while value is not None and at < len(value):
        version, size = _ENTRY.unpack_from(value, at)
        at += _ENTRY.size
        if version <= number:
            return value[at : at + size] or None
        at += size
    return None


def packed_entry(row: bytes, number: int) -> bytes:
    """Returns the entry of a row in a Redis value; empty `row` marks a deleted row."""
    return _ENTRY.pack(number, len(row)) + row
