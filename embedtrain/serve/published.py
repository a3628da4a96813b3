"""Reads what `embedtrain publish` writes; this file can be copied and needs no embedtrain.

    from published import Mirror, RedisRows

    mirror = Mirror("s3://bucket/vectors")        # a folder; needs fsspec, pyarrow and NumPy
    mirror.update()                               # reads the newest version, later what changed since
    vectors = mirror.vectors("item", ["a", "b"])  # [2, dim]; NaN for a name that has no row

    rows = RedisRows("redis://localhost:6379/0")  # Redis; needs redis and NumPy
    vectors, number = rows.vectors("item", ["a", "b"])

Everything that is read together is of one version.
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
"""Of the keys in Redis, unless the URL says `?prefix=NAME`."""
PASSWORD_VARIABLE = "EMBEDTRAIN_REDIS_PASSWORD"
"""Environment variable that holds the password of Redis, if it needs one."""
CHUNK_BYTES = 64 << 20
"""A file in Redis lies in chunks of this size: a value cannot be longer than 512 MiB."""
CONNECT_SECONDS, ANSWER_SECONDS = 10.0, 60.0
"""How long Redis is waited for: until it takes a connection, and for each answer."""

_EXPECTED_URL = "expected redis://HOST:PORT/DATABASE?prefix=NAME"
_MANIFEST = re.compile(r"version-(\d{9,})\.json")
_ENTRY = struct.Struct("<QI")
_TRIES = 5

Vectors = NDArray[np.float32]


class Gone(LookupError):
    """The version that is being read is kept no longer; the newest can be opened instead."""


@dataclass(frozen=True)
class Part:
    """What a version changed in a table.

    Attributes:
        number: the version.
        names: [n], added or changed.
        vectors: [n, dim] float32, their vectors.
        deleted: the names that are gone.
        is_whole: whether `names` are all rows of the table at that version.
    """

    number: int
    names: list[str]
    vectors: Vectors
    deleted: list[str]
    is_whole: bool


class Version:
    """One version of a folder; its files do not change, and stay for as long as some later versions are written.

    Attributes:
        number: counts the versions, from 1 on.
        manifest: the content of its file.
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
        """Yields what to apply, in order, to the rows of the version `since`; a whole part replaces them all.

        Args:
            table: its name.
            since: a version's number; None to begin with nothing.

        Raises:
            ValueError: there is no such table, or no such version yet.
            Gone: later versions have replaced this one.
        """
        facts = self._table(table)
        if since is not None and since > self.number:
            raise ValueError(f"{self._path} has no version {since} yet: the newest is {self.number}")
        parts = facts["parts"]
        if since is not None and since >= parts[0]["number"]:
            parts = [part for part in parts if part["number"] > since]
        for part in parts:
            names, vectors = self._rows(part["rows"], facts["dim"])
            deleted = [] if part["deleted"] is None else self._read(part["deleted"])["name"].to_pylist()
            yield Part(part["number"], names, vectors, deleted, part["is_whole"])

    def dense(self) -> dict[str, NDArray[Any]]:
        """Returns the parameters of the network by name; none if the model has no network."""
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
            raise Gone(f"version {self.number} of {self._path} is kept no longer: open the newest") from error
        if len(data) != self.manifest["files"][file]:
            raise ValueError(f"{self._path}/{file} is damaged: it has {len(data):,} bytes of those that were written")
        return data


class Folder:
    """A folder that `embedtrain publish` writes to.

    Args:
        url: any fsspec URL.
        options: of its file system.
    """

    def __init__(self, url: str, **options: Any) -> None:
        import fsspec

        self._file_system, self._path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)

    def numbers(self) -> list[int]:
        """Returns the numbers of the versions that can be opened, in order."""
        try:
            self._file_system.invalidate_cache()
            names = self._file_system.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        return version_numbers([name.rpartition("/")[2] for name in names])

    def open(self, number: int | None = None) -> Version:
        """Opens a version; None for the newest.

        Raises:
            ValueError: there is none, or it is of a newer format.
            Gone: it is kept no longer.
        """
        found = self.numbers()
        if not found:
            raise ValueError(f"{self._path}: nothing is published there yet")
        if number is not None and number > found[-1]:
            raise ValueError(f"{self._path} has no version {number} yet: the newest is {found[-1]}")
        number = found[-1] if number is None else number
        name = manifest_name(number)
        try:
            data = self._file_system.cat_file(f"{self._path}/{name}")
        except FileNotFoundError as error:
            raise Gone(f"version {number} of {self._path} is kept no longer: open the newest") from error
        return Version(self._file_system, self._path, read_manifest(data, f"{self._path}/{name}"))


class Mirror:
    """The rows of the newest version of a folder, in memory; threads may ask it while another updates it.

    Args:
        url: any fsspec URL.
        options: of its file system.

    Attributes:
        version: whose rows these are; None before the first `update`.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.version: Version | None = None
        self._folder = Folder(url, **options)
        self._tables: dict[str, _Rows] = {}
        self._lock = threading.Lock()

    def update(self) -> bool:
        """Takes over what changed since the last call; returns whether anything did.

        Raises:
            ValueError: nothing is published, or it is of a newer format.
            Gone: each version that was opened was removed before it was read, several times in a row.
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
            raise ValueError(f"there is no table {table!r}; there are {', '.join(self._tables) or 'none'}")
        return self._tables[table]

    def _update(self) -> bool:
        newest, known = self._folder.open(), self.version
        is_same = known is not None and known.manifest["id"] == newest.manifest["id"]
        since = known.number if known is not None and is_same else None
        if since == newest.number:
            return False
        # All is read before any of it is applied: a file may be gone.
        read = {table: list(newest.changes(table, since if table in self._tables else None)) for table in newest.tables}
        with self._lock:
            self._tables = {
                table: self._tables.get(table, _Rows(facts["dim"])).applied(read[table], facts["dim"])
                for table, facts in newest.manifest["tables"].items()
            }
            self.version = newest
        return True


class _Rows:
    """The rows of a table by name."""

    def __init__(self, dim: int) -> None:
        self.places: dict[str, int] = {}
        self._rows: Vectors = np.empty((0, dim), np.float32)
        self._free: list[int] = []

    def applied(self, parts: Sequence[Part], dim: int) -> _Rows:
        """Returns the rows after changes; these themselves, or others if all are replaced."""
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
    """The rows that `embedtrain publish` writes to Redis.

    Args:
        url: `redis://HOST:PORT/DATABASE`, with `?prefix=NAME` if it was published so.
        options: of `redis.Redis`; the password is that of the variable `EMBEDTRAIN_REDIS_PASSWORD` unless given here.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._redis, self._prefix = connect(url, **options)

    def vectors(self, table: str, names: Sequence[str]) -> tuple[Vectors, int]:
        """Returns the vectors [n, dim] of names, NaN for a name that has no row, and the number of their version.

        Raises:
            ValueError: nothing is published, there is no such table, or it is of a newer format.
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
        """Returns the parameters of the network by name, and the number of their version.

        Raises:
            ValueError: nothing is published, or it is of a newer format.
            Gone: the network was replaced while it was read, several times in a row.
        """
        for _ in range(_TRIES):
            head = self._head(self._redis.get(f"{self._prefix}:head"))
            if head["dense"] is None:
                return {}, int(head["number"])
            data = read_chunks(self._redis, self._prefix, head["dense"]["file"])
            if data is not None:
                return read_dense(data), int(head["number"])
        raise Gone(f"{self._prefix}: the network was replaced each time it was read")

    def _head(self, data: bytes | None) -> dict[str, Any]:
        if data is None:
            raise ValueError(f"{self._prefix}: nothing is published there yet")
        return read_manifest(data, f"{self._prefix}:head")


def version_numbers(names: Iterable[str]) -> list[int]:
    """Returns the numbers, in order, of the versions that the files of a folder make exist."""
    return sorted(int(found[1]) for name in names if (found := _MANIFEST.fullmatch(name)))


def manifest_name(number: int) -> str:
    """Returns the name of the file that makes a version exist."""
    return f"version-{number:09d}.json"


def read_manifest(data: bytes, where: str) -> dict[str, Any]:
    """Returns the facts of a version; ValueError if it is none, or of a newer format."""
    try:
        manifest: dict[str, Any] = json.loads(data)
        found, version = manifest["format"], manifest["format_version"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{where} is no version of a publication") from error
    if found != FORMAT or version > VERSION:
        raise ValueError(f"{where} is of format version {version}, and this reads versions up to {VERSION}")
    return manifest


def read_dense(data: bytes) -> dict[str, NDArray[Any]]:
    """Returns the arrays of a safetensors file that holds float32."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    return {
        name: np.frombuffer(data[8 + size :], "<f4")[entry["data_offsets"][0] // 4 : entry["data_offsets"][1] // 4]
        .reshape(entry["shape"])
        .copy()
        for name, entry in header.items()
    }


def split_prefix(url: str) -> tuple[str, str]:
    """Returns a URL of Redis without `?prefix=NAME`, and the name."""
    address, _, query = url.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    prefix = options.pop("prefix", PREFIX)
    return address + (f"?{urlencode(options)}" if options else ""), prefix


def connect(url: str, **options: Any) -> tuple[Any, str]:
    """Returns a client of Redis, which connects when it is first used, and the prefix of the keys.

    Raises:
        ValueError: the URL cannot be read; no part of it that may be a password is in the message.
    """
    import redis

    address, prefix = split_prefix(url)
    parameters = dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))
    if empty := [name for name, value in parameters.items() if not value]:
        raise ValueError(f"its parameter {empty[0]!r} has no value: {_EXPECTED_URL}")
    usual: dict[str, Any] = {"socket_connect_timeout": CONNECT_SECONDS, "socket_timeout": ANSWER_SECONDS}
    if password := os.environ.get(PASSWORD_VARIABLE):
        usual["password"] = password  # one in the URL comes before it
    try:
        client = redis.Redis.from_url(address, **{**usual, **options})
    except ValueError:
        raise ValueError(_EXPECTED_URL) from None
    if not url.startswith("unix:") and re.fullmatch("/?[0-9]*", urlsplit(address).path) is None:
        raise ValueError(f"its database must be a number: {_EXPECTED_URL}")
    pool = client.connection_pool
    try:
        # It refuses parameters that it does not know, and connects to nothing yet.
        pool.connection_class(**pool.connection_kwargs)
    except TypeError as error:
        if unknown := [name for name in parameters if f"{name!r}" in str(error)]:
            raise ValueError(f"it takes no parameter {unknown[0]!r}, and ours is 'prefix': {_EXPECTED_URL}") from error
        raise
    return client, prefix


def chunk_keys(prefix: str, file: str) -> list[str]:
    """Returns the keys of a file in Redis; its name ends with the number of its chunks."""
    return [f"{prefix}:{file}:{place}" for place in range(int(file.rpartition(":")[2]))]


def read_chunks(client: Any, prefix: str, file: str) -> bytes | None:
    """Returns a file in Redis; None if a part of it is missing."""
    chunks = []
    for key in chunk_keys(prefix, file):
        chunk = client.get(key)
        if chunk is None:
            return None
        chunks.append(chunk)
    return b"".join(chunks)


def row_keys(prefix: str, table: str, names: Iterable[str]) -> list[str]:
    """Returns the keys of rows in Redis."""
    start = f"{prefix}:row:{quote(table, safe='')}:"
    return [start + name for name in names]


def committed(value: bytes | None, number: int) -> bytes | None:
    """Returns a row in a value of Redis at a version: the newest of its entries that is not newer; None if deleted."""
    at = 0
    while value is not None and at < len(value):
        version, size = _ENTRY.unpack_from(value, at)
        at += _ENTRY.size
        if version <= number:
            return value[at : at + size] or None
        at += size
    return None


def packed_entry(row: bytes, number: int) -> bytes:
    """Returns the entry of a row, empty if it is deleted, for a value of Redis."""
    return _ENTRY.pack(number, len(row)) + row
