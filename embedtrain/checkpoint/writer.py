"""Writing a checkpoint: every rank writes its shards, then rank 0 commits by creating the manifest."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from embedtrain import storage
from embedtrain.checkpoint.agreement import on_every_rank, on_first_rank
from embedtrain.checkpoint.blocks import BlockHasher
from embedtrain.checkpoint.header import as_bytes, encode_header, row_blocks
from embedtrain.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Parent,
    Piece,
    TensorInfo,
    canonical_json,
    decode,
    encode,
    merge_pieces,
    replicated_file_name,
    shard_file_name,
    step_folder_name,
    temporary_manifest_name,
)
from embedtrain.checkpoint.parts import TensorPart, whole_parts
from embedtrain.distributed.ranks import Ranks
from embedtrain.embedding.shard_view import ShardView, table_steps
from embedtrain.errors import CheckpointError, UserError

_Source = tuple[Tensor, Callable[[], Iterable[Tensor]]]
"""A tensor of the written shape and dtype, and a function that returns the rows in blocks."""


@dataclass(frozen=True)
class Contents:
    """Holds what one rank writes to a checkpoint.

    Attributes:
        step: number of optimizer steps done; names the checkpoint.
        parts: this rank's rows.
        state: JSON; only rank 0's is saved.
        replicated: tensors that all ranks share; only rank 0's are saved.
        parent: the checkpoint that a delta changes; None for a full checkpoint.
        table_steps: number of optimizer steps per table; see `ShardView.steps`.
    """

    step: int
    parts: Sequence[TensorPart]
    state: Mapping[str, Any]
    replicated: Mapping[str, Tensor] = field(default_factory=dict)
    parent: Parent | None = None
    table_steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Returns the approximate number of bytes to write."""
        slots = {id(part.slots): part.slots.nbytes for part in self.parts if part.slots is not None}
        rows = sum(part.like().nbytes for part in self.parts)
        return rows + sum(slots.values()) + sum(tensor.nbytes for tensor in self.replicated.values())


@dataclass(frozen=True)
class SavedCheckpoint:
    """Describes a checkpoint that was just completed.

    Attributes:
        path: its folder.
        identity: its step and its manifest's checksum, with which a delta names its parent.
        num_bytes: size of the files of all ranks, without the manifest.
    """

    path: str
    identity: Parent
    num_bytes: int


def save_checkpoint(
    checkpoints_path: str,
    step: int,
    shards: Sequence[ShardView],
    state: Mapping[str, Any],
    ranks: Ranks,
    replicated: Mapping[str, Tensor] | None = None,
) -> str:
    """Saves a full checkpoint atomically.

    Collective: every rank. The manifest is created after all files are durable and have their full size. A failed
    save removes its files if it can.

    Args:
        checkpoints_path: folder of the run's checkpoints, any fsspec URL that every rank reaches.
        step: number of optimizer steps done; names the checkpoint.
        shards: this rank's shards of the sharded tensors; the shards of all ranks tile each tensor. They must not
            change until the call returns.
        state: other state of the run, as JSON; only rank 0's is saved.
        replicated: small tensors that all ranks share, by name; only rank 0's are saved.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: on every rank. The step already has a complete checkpoint, the shards do not tile their
            tensors, the state is not JSON, the disk is too full, or a rank cannot write.
    """
    contents = Contents(step, whole_parts(shards), state, replicated or {}, table_steps=table_steps(shards))
    return write_checkpoint(checkpoints_path, contents, ranks).path


def write_checkpoint(checkpoints_path: str, contents: Contents, ranks: Ranks) -> SavedCheckpoint:
    """Writes a full checkpoint or a delta with the guarantees of `save_checkpoint`.

    Collective: every rank.
    """
    path = storage.join(checkpoints_path, step_folder_name(contents.step))
    doing = f"step {contents.step} was not saved to {path}"
    rank, world_size = ranks.rank, ranks.size
    num_bytes = sum(on_every_rank(doing, lambda: contents.num_bytes, ranks))
    attempt = on_first_rank(doing, lambda: _begin(path, contents.state, num_bytes), ranks)
    shard_file = shard_file_name(attempt, rank, world_size)
    replicated_file = replicated_file_name(attempt) if contents.replicated and rank == 0 else None

    def write_part() -> _Part:
        part = _write_shards(path, shard_file, contents.parts)
        if replicated_file is not None:
            sources = {name: (each, functools.partial(row_blocks, each)) for name, each in contents.replicated.items()}
            part.files[replicated_file] = _write_tensors(path, replicated_file, sources)[0]
        return part

    try:
        written = on_every_rank(doing, write_part, ranks)
    except (CheckpointError, UserError):
        # Every rank raises this error, so no rank commits. After any other error rank 0 may still commit the files.
        _discard(path, [name for name in (shard_file, replicated_file) if name])
        raise

    def commit() -> SavedCheckpoint:
        files = {name: entry for part in written for name, entry in part.files.items()}
        try:
            _check_sizes(path, files)
            manifest = _assemble(written, files, contents, replicated_file)
            encoded = encode(manifest)
            # A manifest that no reader accepts must not be committed.
            decode(encoded, storage.join(path, MANIFEST_NAME))
        except Exception:
            _discard(path, files)
            raise
        _create_manifest(path, encoded, files, attempt)
        identity = Parent(manifest.step, manifest.checksum)
        return SavedCheckpoint(path, identity, sum(entry.bytes for entry in files.values()))

    return on_first_rank(doing, commit, ranks)


@dataclass(frozen=True)
class _Part:
    """Describes the files that a rank has written.

    Attributes:
        files: manifest entries of its files, by name.
        shards: for each shard its tensor's name, and the tensor's description with this piece only.
    """

    files: dict[str, FileEntry]
    shards: list[tuple[str, TensorInfo]]


def _begin(path: str, state: Mapping[str, Any], num_bytes: int) -> str:
    """Creates the folder and returns the random name of this save."""
    if MANIFEST_NAME in storage.list_files(path):
        raise CheckpointError("the step already has a complete checkpoint, which is never overwritten")
    canonical_json(state)
    storage.make_folder(path)
    free_bytes = storage.free_bytes(path)
    if free_bytes is not None and free_bytes < num_bytes:
        storage.remove_empty_folder(path)
        raise CheckpointError(f"the checkpoint needs {num_bytes:,} bytes, but the disk has {free_bytes:,} bytes left")
    return secrets.token_hex(8)


def _write_shards(path: str, file_name: str, parts: Sequence[TensorPart]) -> _Part:
    sources: dict[str, _Source] = {part.name: (part.like(), part.blocks) for part in parts}
    if len(sources) != len(parts):
        raise ValueError(f"two shards of one rank have the same name: {sorted(part.name for part in parts)}")
    for part in parts:
        if part.slots is not None:
            name = _slots_name(part.name)
            known, _ = sources.setdefault(name, (part.slots, functools.partial(row_blocks, part.slots)))
            if known is not part.slots:
                raise ValueError(f"{name!r} must name one tensor, but names two")
    entry, starts = _write_tensors(path, file_name, sources)
    shards = []
    for part in parts:
        piece = Piece(file_name, part.offset, part.num_rows, starts[part.name])
        if part.slots is not None:
            piece = replace(piece, span=part.span, slots_byte=starts[_slots_name(part.name)])
        shards.append((part.name, TensorInfo(part.global_shape, part.dtype, dict(part.layout), (piece,))))
    return _Part({file_name: entry}, shards)


def _slots_name(name: str) -> str:
    """Returns the name of the tensor of a delta's row numbers: "item/slots" for "item/weight"."""
    return f"{name.rpartition('/')[0]}/slots"


def _write_tensors(path: str, file_name: str, sources: Mapping[str, _Source]) -> tuple[FileEntry, dict[str, int]]:
    """Writes a safetensors file in one pass; returns its manifest entry and each tensor's first byte."""
    header, starts = encode_header({name: like for name, (like, _) in sources.items()})

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for name in starts:
            for block in sources[name][1]():
                yield as_bytes(block)

    hasher = BlockHasher()
    storage.write(storage.join(path, file_name), hasher.passing(chunks))
    return hasher.entry(), starts


def _assemble(
    parts: Sequence[_Part],
    files: Mapping[str, FileEntry],
    contents: Contents,
    replicated_file: str | None,
) -> Manifest:
    """Builds the manifest from the ranks' parts; CheckpointError if they do not tile their tensors."""
    return Manifest(
        step=contents.step,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"embedtrain": own_version(), "torch": torch.__version__},
        world_size=len(parts),
        tensors=merge_pieces([shard for part in parts for shard in part.shards]),
        replicated=replicated_file,
        files=files,
        state=contents.state,
        parent=contents.parent,
        table_steps=contents.table_steps,
    )


def _check_sizes(path: str, files: Mapping[str, FileEntry]) -> None:
    found = storage.list_files(path)
    for name, entry in files.items():
        if found.get(name) != entry.bytes:
            raise CheckpointError(
                f"a rank wrote {name} with {entry.bytes} bytes, but rank 0 finds "
                f"{found.get(name, 'no such file')}: all ranks must share the folder"
            )


def _create_manifest(path: str, manifest: bytes, files: Iterable[str], attempt: str) -> None:
    """Creates the manifest, which commits the checkpoint.

    After an unclear error the files are kept, because the manifest may exist.
    """
    url = storage.join(path, MANIFEST_NAME)
    temporary_url = storage.join(path, temporary_manifest_name(attempt))
    try:
        storage.create(url, manifest, temporary_url)
    except FileExistsError as error:
        _discard(path, files)
        raise CheckpointError("another job has completed this step in the meantime") from error


def _discard(path: str, names: Iterable[str]) -> None:
    """Removes files of a failed save and ignores errors, so that the save's own error is reported."""
    for name in names:
        with suppress(Exception):
            storage.remove(storage.join(path, name))
    with suppress(Exception):
        storage.remove_empty_folder(path)


def own_version() -> str:
    """Returns the version of embedtrain that is installed."""
    try:
        return version("embedtrain")
    except PackageNotFoundError:
        return "not installed"
