"""Destinations of publications: the `Sink` protocol, and folders of Parquet files."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedtrain import storage
from embedtrain.errors import UserError
from embedtrain.serve import published
from embedtrain.serve.published import Vectors

READER_NAME = "published.py"
KEPT_VERSIONS = 3
"""Number of newest versions kept in a folder, so that a reader can finish reading an older version."""

_MAX_PARTS = 50
_ROWS_PER_GROUP = 1 << 16

_logger = logging.getLogger(__name__)


class LostFileError(OSError):
    """A file of the newest version is missing: another publisher wrote a newer version, or the file was lost."""


class TableWriter(Protocol):
    """Writes the changes of a table."""

    def put(self, names: Sequence[str], rows: Vectors) -> None:
        """Writes rows that are new or changed: [n] names and [n, dim] rows."""

    def delete(self, names: Sequence[str]) -> None:
        """Deletes rows by name; called once, after all calls of `put`."""

    def facts(self, old: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Returns the manifest's entry of the table; called after the last row.

        Args:
            old: the table's entry in the previous version, or None.
        """


class Sink(Protocol):
    """A destination of publications, to which versions are written one after another."""

    def newest(self) -> Mapping[str, Any] | None:
        """Returns the manifest of the newest version, or None if nothing is published.

        Raises:
            UserError: the destination holds something else, or a version of a newer format.
            LostFileError: the manifest was removed while it was being read.
            OSError: the destination cannot be reached.
        """

    def read(self, file: str) -> bytes:
        """Returns the bytes of a file that `write_file` wrote.

        Raises:
            LostFileError: the file is gone; the message says what to do if there is no newer version.
        """

    def begin(self, number: int) -> None:
        """Begins writing version `number`.

        Raises:
            UserError: another publisher is writing.
        """

    def wants_whole(self, old: Mapping[str, Any], num_changed: int) -> bool:
        """Returns whether to rewrite the whole table, given its entry in the previous version and the changed rows."""

    def open_table(self, table: str, dim: int, *, is_whole: bool) -> AbstractContextManager[TableWriter]:
        """Opens a table to write its changes or, if `is_whole`, all its rows."""

    def delete_table(self, table: str, names: Sequence[str]) -> None:
        """Deletes a whole table; `names` are the names of all its rows."""

    def write_file(self, name: str, data: bytes, *, is_read: bool = False) -> str:
        """Writes a file of the version and returns its name for `read`.

        Args:
            name: the kind of contents.
            data: the contents.
            is_read: True if readers need the file, False if only the next publication needs it.
        """

    def commit(self, manifest: dict[str, Any]) -> None:
        """Makes the version the newest one atomically, then removes files that are no longer needed.

        Raises:
            OSError: the version cannot be committed, or another publisher has committed this number. A failed removal
                of old files only logs a warning.
        """

    def abandon(self) -> None:
        """Removes the files written since `begin`, ignoring errors."""

    def close(self) -> None:
        """Closes connections."""


def cursor_files(manifest: Mapping[str, Any]) -> set[str]:
    """Returns the files that the next publication needs to find changed rows."""
    cursors = manifest["cursor"].values()
    files = [file for facts in cursors for file in (facts["digests"], *facts["notes"], facts["names"].get("file"))]
    return {file for file in files if file is not None}


class FolderSink:
    """A folder on any fsspec URL, with a JSON manifest per version, and Parquet files that versions share.

    Raises:
        UserError: no file system supports the URL.
    """

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._where = storage.shown(self._url)
        self.number = 0
        self._part = ""
        self._files: dict[str, int] = {}
        storage.local_path(self._url)

    def newest(self) -> Mapping[str, Any] | None:
        """See `Sink`."""
        storage.require_folder(self._url)
        names = storage.list_names(self._url)
        numbers = published.version_numbers(names)
        if not numbers:
            if odd := [name for name in names if name != READER_NAME and not name.startswith("part-")]:
                raise UserError(f"{self._where} holds {odd[0]!r} but no publication: give another folder")
            return None
        return self._manifest(numbers[-1])

    def read(self, file: str) -> bytes:
        """See `Sink`."""
        try:
            return storage.read(storage.join(self._url, file))
        except FileNotFoundError as error:
            raise LostFileError(
                f"{self._where} lacks {file}, which is needed to find changed rows: delete the folder, or "
                "publish to another"
            ) from error

    def begin(self, number: int) -> None:
        """See `Sink`."""
        self.number, self._files = number, {}
        self._part = f"part-{number:09d}-{secrets.token_hex(8)}"
        storage.make_folder(storage.join(self._url, self._part))
        self._write_reader()

    def _write_reader(self) -> None:
        """Writes the reader program to the folder unless the same program is already there."""
        url, program = storage.join(self._url, READER_NAME), Path(published.__file__).read_bytes()
        with suppress(FileNotFoundError):
            if storage.read(url) == program:
                return
        storage.replace(url, program, storage.join(self._url, f"{self._part}.tmp"))

    def wants_whole(self, old: Mapping[str, Any], num_changed: int) -> bool:
        """See `Sink`: the table is rewritten if its changes exceed its rows, or after 50 parts."""
        whole, *changes = old["parts"]
        num_rows = num_changed + sum(part["num_rows"] for part in changes)
        return num_rows > whole["num_rows"] or len(changes) + 1 >= _MAX_PARTS

    @contextmanager
    def open_table(self, table: str, dim: int, *, is_whole: bool) -> Iterator[_FolderTable]:
        """See `Sink`."""
        writer = _FolderTable(self, f"{len(self._files):04d}", dim, is_whole)
        yield writer
        writer.close()

    def delete_table(self, table: str, names: Sequence[str]) -> None:
        """See `Sink`: no-op, because a table that the manifest does not name does not exist."""

    def write_file(self, name: str, data: bytes, *, is_read: bool = False) -> str:
        """See `Sink`."""
        file = f"{self._part}/{len(self._files):04d}-{name}"
        storage.write(storage.join(self._url, file), [data])
        self.note(file, len(data), is_read=is_read)
        return file

    def new_file(self, name: str) -> tuple[str, AbstractContextManager[Any]]:
        """Returns the name of a new file of this version, and a context manager that opens it for writing."""
        file = f"{self._part}/{name}"
        return file, storage.new_file(storage.join(self._url, file))

    def note(self, file: str, num_bytes: int, *, is_read: bool = True) -> None:
        """Records a written file; the manifest lists its size if readers need it."""
        self._files[file] = num_bytes if is_read else -1

    def commit(self, manifest: dict[str, Any]) -> None:
        """See `Sink`."""
        parts = [part for facts in manifest["tables"].values() for part in facts["parts"]]
        needed = {part[kind] for part in parts for kind in ("rows", "deleted")}
        needed |= {manifest["dense"]["file"]} if manifest["dense"] else set()
        earlier = {} if self.number == 1 else self._manifest(self.number - 1)["files"]
        sizes = {**earlier, **self._files}
        manifest["files"] = {file: sizes[file] for file in sorted(needed - {None})}
        name = published.manifest_name(self.number)
        data, temporary_url = json.dumps(manifest, indent=1).encode(), storage.join(self._url, f"{self._part}.tmp")
        storage.create(storage.join(self._url, name), data, temporary_url)
        try:
            self._sweep(manifest)
        except (OSError, UserError, ValueError) as error:
            _logger.warning(f"version {self.number} is published, but data of older versions was not removed: {error}")

    def abandon(self) -> None:
        """See `Sink`."""
        with suppress(Exception):
            self._remove(self._part, frozenset())

    def close(self) -> None:
        """See `Sink`."""

    def _manifest(self, number: int) -> dict[str, Any]:
        url = storage.join(self._url, published.manifest_name(number))
        try:
            return published.read_manifest(storage.read(url), storage.shown(url))
        except FileNotFoundError as error:
            raise LostFileError(f"{storage.shown(url)} was removed while it was being read: publish again") from error
        except ValueError as error:
            raise UserError(str(error)) from error

    def _sweep(self, manifest: Mapping[str, Any]) -> None:
        """Removes old versions, manifests first, then the files that no kept version needs."""
        names = storage.list_names(self._url)
        numbers = published.version_numbers(names)
        for number in numbers[:-KEPT_VERSIONS]:
            storage.remove(storage.join(self._url, published.manifest_name(number)))
        kept = {file for number in numbers[-KEPT_VERSIONS:] for file in self._manifest(number)["files"]}
        kept |= cursor_files(manifest)
        for name in names:
            # Parts of killed publishers have at most this version's number; another running publisher has a later one.
            if name.startswith("part-") and int(name.split("-")[1]) <= self.number:
                if name.endswith(".tmp"):
                    storage.remove(storage.join(self._url, name))
                else:
                    self._remove(name, frozenset(kept))

    def _remove(self, part: str, kept: frozenset[str]) -> None:
        folder = storage.join(self._url, part)
        for name in storage.list_files(folder):
            if f"{part}/{name}" not in kept:
                storage.remove(storage.join(folder, name))
        storage.remove_empty_folder(folder)


class _FolderTable:
    """Writes the changes of a table as two Parquet files: `name` and `vector` of changed rows, `name` of deleted rows.

    Args:
        folder: the sink.
        prefix: prefix of the file names.
        dim: dim of the vectors.
        is_whole: whether all rows of the table are written.
    """

    def __init__(self, folder: FolderSink, prefix: str, dim: int, is_whole: bool) -> None:
        self._folder, self._prefix, self._dim, self._is_whole = folder, prefix, dim, is_whole
        self._schema = pa.schema([("name", pa.large_string()), ("vector", pa.list_(pa.float32(), dim))])
        self._held: list[pa.Table] = []
        self._num_rows = 0
        self._rows_file: str | None = None
        self._deleted_file: str | None = None
        self._stack = ExitStack()
        self._file: Any = None
        self._writer: pq.ParquetWriter | None = None

    def put(self, names: Sequence[str], rows: Vectors) -> None:
        """See `TableWriter`."""
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(rows).ravel()), self._dim)
        self._held.append(pa.table([pa.array(names, pa.large_string()), vectors], schema=self._schema))
        self._num_rows += len(names)
        if sum(map(len, self._held)) >= _ROWS_PER_GROUP:
            self._flush()

    def delete(self, names: Sequence[str]) -> None:
        """See `TableWriter`."""
        if names and not self._is_whole:
            buffer = pa.BufferOutputStream()
            pq.write_table(pa.table({"name": pa.array(names, pa.large_string())}), buffer)
            self._deleted_file = self._folder.write_file("deleted.parquet", buffer.getvalue(), is_read=True)

    def facts(self, old: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """See `TableWriter`."""
        part = {
            "number": self._folder.number,
            "num_rows": self._num_rows,
            "is_whole": self._is_whole,
            "rows": self._rows_file,
            "deleted": self._deleted_file,
        }
        if old is None or self._is_whole:
            return {"parts": [part]}
        has_changes = self._rows_file is not None or self._deleted_file is not None
        return {"parts": [*old["parts"], part] if has_changes else old["parts"]}

    def close(self) -> None:
        """Closes the file of rows."""
        self._flush()
        if self._writer is not None and self._rows_file is not None:
            self._writer.close()
            self._folder.note(self._rows_file, self._file.tell())
        self._stack.close()

    def _flush(self) -> None:
        if not self._held:
            return
        if self._writer is None:
            self._rows_file, opened = self._folder.new_file(f"{self._prefix}-rows.parquet")
            self._file = self._stack.enter_context(opened)
            options = {"use_dictionary": False, "compression": {"name": "zstd", "vector.list.element": "none"}}
            self._writer = pq.ParquetWriter(self._file, self._schema, **options)
        self._writer.write_table(pa.concat_tables(self._held))
        self._held = []
