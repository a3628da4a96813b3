"""Publishes a run: writes the rows that changed since the newest published version to a destination, by name.

A destination is a URL. Its newest version holds a cursor: the name and a hash of each published row. A publication
compares these hashes with the rows of a checkpoint. So the history between two publications does not matter: deltas,
deleted checkpoints, a resumed or grown run, or a different run.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import xxhash

from embedtrain import storage
from embedtrain.checkpoint import CheckpointReader, choose_checkpoint, find_checkpoints
from embedtrain.checkpoint.choice import Step
from embedtrain.errors import CheckpointError, UserError
from embedtrain.serve.changes import Digests, Table, TableChanges, compare, dense_of, names_facts, names_from, texts_of
from embedtrain.serve.publication_sinks import FolderSink, LostFileError, Sink
from embedtrain.serve.published import FORMAT, PASSWORD_VARIABLE, VERSION, Vectors
from embedtrain.train.run_folder import RunFolder

_REDIS_SCHEMES = ("redis://", "rediss://", "unix://")
_TRIES = 3
_NOTE = np.dtype([("place", "<i8"), ("digest", "<u8")])
"""Place and hash of a changed row."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableCounts:
    """Counts the published rows of a table."""

    added: int
    changed: int
    deleted: int


@dataclass(frozen=True)
class Published:
    """Describes the result of a publication.

    Attributes:
        number: number of the newest version.
        step: step of the published checkpoint.
        is_new: whether a new version was written; False if nothing has changed.
        tables: counts of changed rows per table.
        gone: tables that were removed from the destination, with the number of rows each had.
        dense: whether the parameters of the dense network were kept, written or removed.
    """

    number: int
    step: int
    is_new: bool
    tables: Mapping[str, TableCounts] = field(default_factory=dict)
    gone: Mapping[str, int] = field(default_factory=dict)
    dense: Literal["kept", "written", "gone"] = "kept"


def open_sink(url: str) -> Sink:
    """Returns the sink for a destination URL, without connecting or writing.

    Raises:
        UserError: the kind of URL is not supported, or needs a package that is not installed.
    """
    if url.startswith(_REDIS_SCHEMES):
        from embedtrain.serve.redis_sink import RedisSink

        return RedisSink(url)
    return FolderSink(url)


def require_no_password(key: str, url: str) -> None:
    """Checks that the URL in setting `key` has no password.

    Raises:
        UserError: the URL has a password; names the environment variable to use instead.
    """
    if storage.has_password(url):
        scheme = url.partition("://")[0]
        variable = PASSWORD_VARIABLE if url.startswith(_REDIS_SCHEMES) else f"FSSPEC_{scheme.upper()}_PASSWORD"
        raise UserError(
            f"{key}={storage.shown(url)} contains a password, which config.yaml, checkpoints and trackers would "
            f"store: remove it and set the environment variable {variable}"
        )


def require_lasting(url: str) -> None:
    """Checks that the destination outlives this process.

    Raises:
        UserError: the destination is in memory.
    """
    if not url.startswith(_REDIS_SCHEMES) and storage.is_in_memory(url):
        raise UserError(
            f"{url} is in the memory of this process and is lost when the process ends: give a folder or a Redis URL"
        )


def require_reachable(url: str, model: str | None = None) -> None:
    """Checks that the run can publish to the destination now.

    Args:
        url: URL of the destination.
        model: the run's kind of model; None if it is not known.

    Raises:
        UserError: the destination cannot be reached, holds something else, or has a version of another kind of model.
    """
    sink = open_sink(url)
    try:
        _require_same_model(model, sink.newest(), url)
    except LostFileError:
        pass  # Another publisher is writing there.
    except OSError as error:
        raise UserError(f"cannot publish to {storage.shown(url)}: {error}") from error
    finally:
        sink.close()


def publish(run_path: str, url: str, *, step: Step = None, tables: Sequence[str] | None = None) -> Published:
    """Writes the rows of a checkpoint that differ from the destination's newest version, as the next version.

    The new version appears atomically. Until then readers see the previous version, also if the publisher is killed.

    Args:
        run_path: the run folder, any fsspec URL.
        url: the destination: a folder (any fsspec URL), or `redis://HOST:PORT/DATABASE?prefix=NAME`.
        step: the checkpoint's step; None for the best checkpoint if the run keeps its best, otherwise the newest.
        tables: names of the tables; None for the tables of the previous version, or all if there is none.

    Raises:
        UserError: there is no checkpoint or no such table, the kind of URL is not supported, or the destination holds
            something else, for example another kind of model.
        CheckpointError: the checkpoint is damaged.
        OSError: the destination cannot be reached.
    """
    folder = RunFolder(run_path)
    sink = open_sink(url)
    try:
        for last in range(_TRIES):
            path = choose_checkpoint(folder.checkpoints_path, step, folder.path)
            old = None
            try:
                old = sink.newest()
                with CheckpointReader(path) as reader:
                    _require_same_model(_model_of(reader), old, url)
                    return _publish_checkpoint(reader, folder.path, sink, tables, old)
            except LostFileError as error:
                # Another publisher may have written a newer version and removed files of the older one.
                if _is_same(old, sink.newest()):
                    raise UserError(str(error)) from error
                if last == _TRIES - 1:
                    raise UserError(
                        f"other publishers wrote to {storage.shown(url)} during {_TRIES} attempts: publish again"
                    ) from error
            except (CheckpointError, FileNotFoundError):
                # The run may have saved a newer checkpoint and deleted this one.
                is_there = path in [found.path for found in find_checkpoints(folder.checkpoints_path)]
                if last == _TRIES - 1 or is_there:
                    raise
    finally:
        sink.close()
    raise AssertionError("the last try returns or raises")


def _model_of(reader: CheckpointReader) -> str | None:
    """Returns the run's kind of model; None if the checkpoint was not saved by a run."""
    config = reader.state.get("config")
    model = config.get("model") if isinstance(config, Mapping) else None
    return model if isinstance(model, str) else None


def _require_same_model(model: str | None, old: Mapping[str, Any] | None, url: str) -> None:
    """Refuses to replace one kind of model by another: its readers would lose their tables."""
    if old is not None and None not in (model, old.get("model")) and model != old["model"]:
        raise UserError(
            f"{storage.shown(url)} holds a {old['model']} model of {old['run']}, but this run is a {model} model: "
            "publish to another folder or under another prefix"
        )


def _is_same(one: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> bool:
    """Returns whether two manifests describe the same version."""
    return (one and one["version_id"]) == (other and other["version_id"])


def _publish_checkpoint(
    reader: CheckpointReader, run_path: str, sink: Sink, wanted: Sequence[str] | None, old: Mapping[str, Any] | None
) -> Published:
    checkpoint = {"step": reader.step, "checksum": reader.manifest.checksum}
    selected = wanted if wanted is not None else old.get("selected") if old else None
    if old is not None and (checkpoint, selected) == (old["checkpoint"], old["selected"]):
        return Published(old["number"], old["step"], False)
    tables = [Table(reader, run_path, name) for name in _chosen(reader, selected)]
    comparison = _Comparison(tables, dense_of(reader), old, sink)
    if old is not None and comparison.is_none:
        return Published(old["number"], reader.step, False)
    version_id = secrets.token_hex(8)
    with _writing(sink, old, version_id) as number:
        manifest = {
            "format": FORMAT,
            "format_version": VERSION,
            "id": secrets.token_hex(8) if old is None else old["id"],
            "number": number,
            "version_id": version_id,
            "step": reader.step,
            "run": storage.shown(run_path),
            "model": _model_of(reader),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "checkpoint": checkpoint,
            "selected": None if selected is None else list(selected),
            **comparison.write(sink),
        }
        sink.commit(manifest)
    return Published(number, reader.step, True, comparison.counts, comparison.gone, comparison.dense)


@contextmanager
def _writing(sink: Sink, old: Mapping[str, Any] | None, version_id: str) -> Iterator[int]:
    number = 1 if old is None else old["number"] + 1
    sink.begin(number)
    try:
        yield number
    except Exception as error:
        newest = sink.newest()
        if newest is not None and newest["version_id"] == version_id:
            _logger.warning(f"version {number} is published, but cleaning up failed: {error}")
            return
        sink.abandon()
        if newest is not None and newest["number"] >= number:
            # The other publisher has also removed the files written here.
            raise UserError(f"another publisher wrote version {number} at the same time: publish again") from error
        raise


def _chosen(reader: CheckpointReader, selected: Sequence[str] | None) -> list[str]:
    there = sorted(name.removesuffix("/weight") for name in reader.tensors if name.endswith("/weight"))
    if wrong := [name for name in selected or [] if name not in there]:
        raise UserError(f"{reader.path} has no table {wrong[0]!r}; it has {', '.join(there)}")
    return there if selected is None else list(selected)


class _Comparison:
    """Compares a checkpoint with the newest version of a destination."""

    def __init__(
        self, tables: Sequence[Table], dense: Mapping[str, Vectors], old: Mapping[str, Any] | None, sink: Sink
    ) -> None:
        self._tables, self._dense = tables, dense
        self._old: Mapping[str, Any] = old or {"tables": {}, "cursor": {}, "dense": None}
        digest = _digest_of(dense)
        self._dense_digest = digest
        is_kept = digest == (self._old["dense"] or {}).get("digest")
        self.dense: Literal["kept", "written", "gone"] = "kept" if is_kept else "written" if dense else "gone"
        self._old_names = {name: _read_names(sink, facts) for name, facts in self._old["cursor"].items()}
        self._changes = {table.name: self._compare(table, sink) for table in tables}
        self.gone = {
            name: int(facts["num_rows"]) for name, facts in self._old["tables"].items() if name not in self._changes
        }

    @property
    def is_none(self) -> bool:
        """Whether the destination already holds the checkpoint's contents."""
        return all(each.is_none for each in self._changes.values()) and not self.gone and self.dense == "kept"

    @property
    def counts(self) -> dict[str, TableCounts]:
        return {
            name: TableCounts(each.num_added, len(each.changed) - each.num_added, len(each.deleted))
            for name, each in self._changes.items()
        }

    def write(self, sink: Sink) -> dict[str, Any]:
        """Writes the changes; returns the manifest's entries for tables, network and cursor."""
        facts, cursor = {}, {}
        for name in self.gone:
            sink.delete_table(name, self._old_names[name])
        for table in self._tables:
            changes = self._changes[table.name]
            facts[table.name] = self._write_table(sink, table, changes)
            cursor[table.name] = self._write_cursor(sink, table, changes)
        dense = self._old["dense"]
        if self.dense != "kept":
            data = safetensors.numpy.save({name: np.ascontiguousarray(each) for name, each in self._dense.items()})
            file = sink.write_file("dense.safetensors", data, is_read=True) if self._dense else None
            dense = None if file is None else {"file": file, "digest": self._dense_digest}
        return {"tables": facts, "dense": dense, "cursor": cursor}

    def _compare(self, table: Table, sink: Sink) -> TableChanges:
        facts = self._old["cursor"].get(table.name)
        digests = table.digests()
        if facts is None:
            return compare(table.names, digests, [], np.empty(0, np.uint64))
        old_digests = _read_digests(sink, facts)
        found = compare(table.names, digests, self._old_names[table.name], old_digests)
        if facts["dim"] != table.dim:
            return TableChanges(np.arange(len(digests)), found.num_added, found.deleted, digests, found.has_same_names)
        return found

    def _write_table(self, sink: Sink, table: Table, changes: TableChanges) -> Mapping[str, Any]:
        old = self._old["tables"].get(table.name)
        is_whole = old is None or old["dim"] != table.dim or sink.wants_whole(old, len(changes.changed))
        places = np.arange(len(table.names)) if is_whole else changes.changed
        with sink.open_table(table.name, table.dim, is_whole=is_whole) as writer:
            for names, rows in table.blocks(places):
                writer.put(names, rows)
            writer.delete(changes.deleted)
        facts = {"dim": table.dim, "num_rows": len(table.names)}
        return {**facts, **writer.facts(old)}

    def _write_cursor(self, sink: Sink, table: Table, changes: TableChanges) -> Mapping[str, Any]:
        old: Mapping[str, Any] | None = self._old["cursor"].get(table.name)
        if old is not None and changes.is_none:
            return old
        names = self._write_names(sink, table, changes)
        num_noted = len(changes.changed) + (0 if old is None else old["num_noted"])
        # Notes of changed rows are written until they reach half the size of all hashes; then all hashes are rewritten.
        if old is not None and changes.has_same_names and _NOTE.itemsize * num_noted <= 4 * len(changes.digests):
            noted = np.empty(len(changes.changed), _NOTE)
            noted["place"], noted["digest"] = changes.changed, changes.digests[changes.changed]
            notes = [*old["notes"], sink.write_file("changed-digests", noted.tobytes())]
            return {**old, "dim": table.dim, "notes": notes, "num_noted": num_noted, "names": names}
        digests = sink.write_file("digests", changes.digests.astype("<u8").tobytes())
        return {"dim": table.dim, "digests": digests, "notes": [], "num_noted": 0, "names": names}

    def _write_names(self, sink: Sink, table: Table, changes: TableChanges) -> Mapping[str, Any]:
        if (facts := names_facts(table.names)) is not None:
            return facts
        old: Mapping[str, Any] | None = self._old["cursor"].get(table.name, {}).get("names")
        if old is not None and "file" in old and changes.has_same_names:
            return old
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({"name": texts_of(table.names)}), buffer, compression="zstd")
        return {"file": sink.write_file("names.parquet", buffer.getvalue())}


def _read_digests(sink: Sink, cursor: Mapping[str, Any]) -> Digests:
    """Returns the hashes of a table's rows: a full list, updated by the notes of later versions."""
    digests = np.frombuffer(sink.read(cursor["digests"]), "<u8").astype(np.uint64)
    for file in cursor["notes"]:
        noted = np.frombuffer(sink.read(file), _NOTE)
        digests[noted["place"]] = noted["digest"]
    return digests


def _read_names(sink: Sink, cursor: Mapping[str, Any]) -> Sequence[str]:
    facts = cursor["names"]
    if "file" not in facts:
        return names_from(facts)
    names: list[str] = pq.read_table(pa.BufferReader(sink.read(facts["file"])))["name"].to_pylist()
    return names


def _digest_of(dense: Mapping[str, Vectors]) -> str | None:
    if not dense:
        return None
    digest = xxhash.xxh3_128()
    for name, values in sorted(dense.items()):
        digest.update(f"{name} {values.shape}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
