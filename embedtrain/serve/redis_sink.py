"""Publication to Redis: one key per row, whose value holds two versions of the row while a version is written.

All keys begin with the prefix of the URL. The key `head` holds the manifest of the newest version. It is replaced
last, and readers get it and the rows in one transaction.

The value of a row is a list of entries, newest first. An entry is the version's number, the length of the row, and
the row; length 0 marks a deleted row. Each write also appends its keys atomically to the list `pending`. Settling
cuts each pending value to its newest entry that is not newer than the head. After a commit this drops the previous
version; after a killed publisher it drops the incomplete version.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from embedtrain import storage
from embedtrain.errors import UserError
from embedtrain.serve import published
from embedtrain.serve.publication_sinks import LostFileError, cursor_files
from embedtrain.serve.published import Vectors, chunk_keys, packed_entry, read_chunks, row_keys

LOCK_SECONDS = 30.0
"""A publisher's lock expires after this many seconds without a write."""

_ROWS_AT_ONCE = 500
"""Rows per script. A script blocks the server, for about a millisecond at this size."""
_SCRIPTS_AT_ONCE = 32
_POLL_SECONDS = 0.1

_logger = logging.getLogger(__name__)

_NEWEST = """
local function newest(value, number)
  local at = 1
  while value and at <= #value do
    local version, size = struct.unpack('<I8I4', value, at)
    if version <= number then return string.sub(value, at, at + 11 + size), size end
    at = at + 12 + size
  end
  return '', 0
end
"""
_IF_LOCKED = """
if redis.call('get', KEYS[1]) ~= ARGV[1] then return -1 end
redis.call('pexpire', KEYS[1], ARGV[2])
"""
# KEYS: lock, pending, rows; ARGV: token, milliseconds, number of the head, entries.
_WRITE = f"""{_NEWEST}{_IF_LOCKED}
local values, written = redis.call('mget', unpack(KEYS, 3)), {{}}
for place, value in ipairs(values) do
  written[2 * place - 1] = KEYS[place + 2]
  written[2 * place] = ARGV[place + 3] .. newest(value, tonumber(ARGV[3]))
end
redis.call('mset', unpack(written))
redis.call('rpush', KEYS[2], unpack(KEYS, 3))
return #values
"""
# KEYS: lock, pending; ARGV: token, milliseconds, number of the head, how many.
_SETTLE = f"""{_NEWEST}{_IF_LOCKED}
local keys = redis.call('lrange', KEYS[2], 0, tonumber(ARGV[4]) - 1)
if #keys == 0 then return 0 end
for place, value in ipairs(redis.call('mget', unpack(keys))) do
  local entry, size = newest(value, tonumber(ARGV[3]))
  if size == 0 then redis.call('del', keys[place])
  elseif #entry < #value then redis.call('set', keys[place], entry) end
end
redis.call('ltrim', KEYS[2], #keys, -1)
return #keys
"""
# KEYS: lock, key; ARGV: token, milliseconds, value.
_SET = f"{_IF_LOCKED} redis.call('set', KEYS[2], ARGV[3]) return 1"
# KEYS: lock; ARGV: token, milliseconds.
_RENEW = f"{_IF_LOCKED} return 1"
# KEYS: lock; ARGV: token.
_UNLOCK = "if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) end"

_SCRIPTS = {"write": _WRITE, "settle": _SETTLE, "set": _SET, "renew": _RENEW, "unlock": _UNLOCK}


class RedisSink:
    """A Redis server as the destination of publications; see `Sink`.

    Args:
        url: `redis://HOST:PORT/DATABASE?prefix=NAME`; `rediss://` and `unix://` also work.

    Raises:
        UserError: the package redis is not installed, or the URL is invalid.
    """

    def __init__(self, url: str) -> None:
        try:
            import redis
        except ImportError as error:
            raise UserError(f"{storage.shown(url)} needs the package redis: pip install 'embedtrain[redis]'") from error
        try:
            self._redis, self._prefix = published.connect(url)
        except ValueError as error:
            raise UserError(f"{storage.shown(url)!r} is not a valid Redis URL: {error}") from error
        self._where = published.split_prefix(storage.shown(url))[0].removeprefix("redis://").rpartition("@")[2]
        self._error, self._refusal = redis.RedisError, redis.AuthenticationError
        self._scripts = {name: self._redis.register_script(text) for name, text in _SCRIPTS.items()}
        self._token = secrets.token_hex(8)
        self._head: Mapping[str, Any] | None = None
        self._head_data: bytes | None = None
        self._number = 0
        self._num_files = 0
        self._has_locked = False

    def newest(self) -> Mapping[str, Any] | None:
        """See `Sink`."""
        with self._asked():
            data = self._redis.get(self._key("head"))
        try:
            self._head = None if data is None else published.read_manifest(data, f"{self._where}: {self._key('head')}")
            self._head_data = data
        except ValueError as error:
            raise UserError(str(error)) from error
        return self._head

    def read(self, file: str) -> bytes:
        """See `Sink`."""
        with self._asked():
            data = read_chunks(self._redis, self._prefix, file)
        if data is None:
            raise LostFileError(
                f"Redis at {self._where} lacks the key {self._key(file)}, needed to find changed rows (a server "
                f"short of memory may evict keys): delete the keys that begin with {self._prefix}:, or publish with "
                "another prefix"
            )
        return data

    def begin(self, number: int) -> None:
        """See `Sink`."""
        self._number, self._num_files = number, 0
        with self._asked():
            self._lock()
            if self._redis.get(self._key("head")) != self._head_data:
                raise UserError(f"another publisher wrote version {number} at the same time: publish again")
            self._settle(number - 1)
            self._sweep(self._head)

    def wants_whole(self, old: Mapping[str, Any], num_changed: int) -> bool:
        """See `Sink`: always False, because rows are replaced in place."""
        return False

    @contextmanager
    def open_table(self, table: str, dim: int, *, is_whole: bool) -> Iterator[_RedisTable]:
        """See `Sink`."""
        with self._asked():
            self._renew()
        yield _RedisTable(self, table)

    def delete_table(self, table: str, names: Sequence[str]) -> None:
        """See `Sink`."""
        self.write_rows(table, names, [b""] * len(names))

    def write_rows(self, table: str, names: Sequence[str], rows: Sequence[bytes]) -> None:
        """Writes rows of the version, empty bytes for deleted rows; readers see them only after the commit."""
        with self._asked():
            at_once = _ROWS_AT_ONCE * _SCRIPTS_AT_ONCE
            for first in range(0, len(names), at_once):
                with self._redis.pipeline(transaction=False) as pipeline:
                    for start in range(first, min(first + at_once, len(names)), _ROWS_AT_ONCE):
                        some = slice(start, start + _ROWS_AT_ONCE)
                        keys = row_keys(self._prefix, table, names[some])
                        entries = [packed_entry(row, self._number) for row in rows[some]]
                        self._call("write", ["pending"], [self._number - 1, *entries], keys, pipeline)
                    self._require_lock(*pipeline.execute())

    def write_file(self, name: str, data: bytes, *, is_read: bool = False) -> str:
        """See `Sink`."""
        view, size = memoryview(data), published.CHUNK_BYTES
        file = f"file:{self._number}:{self._num_files}:{name}:{-(-len(view) // size)}"
        self._num_files += 1
        with self._asked():
            self._renew()
            self._redis.sadd(self._key("files"), file)
            for place, key in enumerate(chunk_keys(self._prefix, file)):
                chunk = bytes(view[place * size : (place + 1) * size])
                self._require_lock(self._call("set", [], [chunk], [key]))
        return file

    def commit(self, manifest: dict[str, Any]) -> None:
        """See `Sink`."""
        with self._asked():
            self._require_lock(self._call("set", ["head"], [json.dumps(manifest)]))
            self._head = manifest
            try:
                self._settle(self._number)
                self._sweep(manifest)
            except (self._error, UserError) as error:
                _logger.warning(
                    f"version {self._number} is published, but data of older versions was not removed: {error}"
                )

    def abandon(self) -> None:
        """See `Sink`: no-op, because the next publisher drops the incomplete version."""

    def close(self) -> None:
        """See `Sink`."""
        if self._has_locked:
            with suppress(self._error):
                self._scripts["unlock"](keys=[self._key("lock")], args=[self._token])
        self._redis.close()

    def _key(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    @contextmanager
    def _asked(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            is_refused = isinstance(error, self._refusal)
            advice = f"; set its password in the variable {published.PASSWORD_VARIABLE}" if is_refused else ""
            raise OSError(f"cannot use Redis at {self._where}: {error}{advice}") from error

    def _lock(self) -> None:
        """Takes the lock; waits for other publishers until the lock of a killed publisher would have expired."""
        self._has_locked = True
        until = time.monotonic() + LOCK_SECONDS + 1
        while not self._redis.set(self._key("lock"), self._token, nx=True, px=round(1000 * LOCK_SECONDS)):
            if time.monotonic() > until:
                raise UserError(
                    f"another publisher is writing to {self._where} under {self._prefix}: wait until it is done"
                )
            time.sleep(_POLL_SECONDS)

    def _call(
        self, script: str, names: Sequence[str], values: Sequence[Any], keys: Sequence[str] = (), client: Any = None
    ) -> Any:
        """Runs a script, which makes changes only while this publisher holds the lock."""
        arguments: list[Any] = [self._token, round(1000 * LOCK_SECONDS), *values]
        own = [self._key(name) for name in ("lock", *names)]
        return self._scripts[script](keys=[*own, *keys], args=arguments, client=client)

    def _require_lock(self, *answers: Any) -> None:
        if -1 in answers:
            is_taken = self._redis.get(self._key("lock")) is not None
            raise UserError(
                f"this publisher's lock on {self._where} under {self._prefix} expired after {LOCK_SECONDS:g} "
                f"seconds without a write{', and another publisher holds it now' if is_taken else ''}: publish again"
            )

    def _renew(self) -> None:
        self._require_lock(self._call("renew", [], []))

    def _settle(self, number: int) -> None:
        """Cuts each pending value to its newest entry that is not newer than version `number`."""
        while True:
            done = self._call("settle", ["pending"], [number, _ROWS_AT_ONCE])
            self._require_lock(done)
            if done == 0:
                return

    def _sweep(self, manifest: Mapping[str, Any] | None) -> None:
        """Removes the files that the version of `manifest` does not need."""
        kept: set[str] = set()
        if manifest is not None:
            kept = cursor_files(manifest)
            kept |= {manifest["dense"]["file"]} if manifest["dense"] else set()
        for file in {name.decode() for name in self._redis.smembers(self._key("files"))} - kept:
            for key in chunk_keys(self._prefix, file):
                self._redis.delete(key)
            self._redis.srem(self._key("files"), file)


class _RedisTable:
    """Writes the changes of a table to Redis; see `TableWriter`."""

    def __init__(self, sink: RedisSink, table: str) -> None:
        self._sink, self._table = sink, table

    def put(self, names: Sequence[str], rows: Vectors) -> None:
        """See `TableWriter`."""
        width = 4 * rows.shape[1]
        data = rows.astype("<f4").tobytes()
        self._sink.write_rows(
            self._table, names, [data[place * width : (place + 1) * width] for place in range(len(rows))]
        )

    def delete(self, names: Sequence[str]) -> None:
        """See `TableWriter`."""
        self._sink.write_rows(self._table, names, [b""] * len(names))

    def facts(self, old: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """See `TableWriter`."""
        return {}
