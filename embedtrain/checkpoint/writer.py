"""Saving: every rank writes its shard, then rank 0 makes the checkpoint exist by creating the manifest."""

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
"""A tensor of the shape and dtype that is written, and where its rows come from, block by block."""


@dataclass(frozen=True)
class Contents:
    """What a rank gives to a checkpoint.

    Attributes:
        step: number of optimizer steps done; names the checkpoint.
        parts: this rank's rows.
        state: JSON; rank 0's is saved.
        replicated: tensors that all ranks share; rank 0's are saved.
        parent: of a delta, the checkpoint that it changes.
        table_steps: the steps that each table's optimizer did; see `ShardView.steps`.
    """

    step: int
    parts: Sequence[TensorPart]
    state: Mapping[str, Any]
    replicated: Mapping[str, Tensor] = field(default_factory=dict)
    parent: Parent | None = None
    table_steps: Mapping[str, int] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Returns about how many bytes will be written."""
        slots = {id(part.slots): part.slots.nbytes for part in self.parts if part.slots is not None}
        rows = sum(part.like().nbytes for part in self.parts)
        return rows + sum(slots.values()) + sum(tensor.nbytes for tensor in self.replicated.values())


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint that was just completed.

    Attributes:
        path: its folder.
        identity: its step and the checksum of its manifest, by which a delta names its parent.
        num_bytes: size of its files over all ranks, without the manifest.
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
    """Saves a checkpoint, which exists as a whole on return and not at all before its last act.

    Collective: every rank. The files are durable and checked for their size before the
    manifest is created. A failed attempt removes what it wrote where it can.

    Args:
        checkpoints_path: folder of the run's checkpoints, any fsspec URL that every rank reaches.
        step: number of optimizer steps done; names the checkpoint.
        shards: this rank's parts of the tensors that are cut over the ranks. The parts of all ranks
            tile each tensor. Not written to by anyone until the call returns.
        state: what else a run needs, as JSON; rank 0's is saved.
        replicated: small tensors that all ranks share, by name; rank 0's are saved.

    Returns:
        The checkpoint's path.

    Raises:
        CheckpointError: on every rank alike. The step is complete already, the shards do not tile their
            tensors, the state is not JSON, the disk is too full, or a rank could not write.
    """
    contents = Contents(step, whole_parts(shards), state, replicated or {}, table_steps=table_steps(shards))
    return write_checkpoint(checkpoints_path, contents, ranks).path


def write_checkpoint(checkpoints_path: str, contents: Contents, ranks: Ranks) -> SavedCheckpoint:
    """Writes a checkpoint; `save_checkpoint` says what that promises.

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
        # All ranks know of this failure. After any other, rank 0 may have gone on to commit this file.
        _discard(path, [name for name in (shard_file, replicated_file) if name])
        raise

    def commit() -> SavedCheckpoint:
        files = {name: entry for part in written for name, entry in part.files.items()}
        try:
            _check_sizes(path, files)
            manifest = _assemble(written, files, contents, replicated_file)
            encoded = encode(manifest)
            # What no reader would take must not be committed.
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
    """What a rank has written.

    Attributes:
        files: entries of its files, by name.
        shards: for each of its shards the tensor's name, and the tensor with this piece alone.
    """

    files: dict[str, FileEntry]
    shards: list[tuple[str, TensorInfo]]


def _begin(path: str, state: Mapping[str, Any], num_bytes: int) -> str:
    """Makes the folder and returns the name of this attempt."""
    if MANIFEST_NAME in storage.list_files(path):
        raise CheckpointError("it is complete already, and a complete checkpoint is never overwritten")
    canonical_json(state)
    storage.make_folder(path)
    free_bytes = storage.free_bytes(path)
    if free_bytes is not None and free_bytes < num_bytes:
        storage.remove_empty_folder(path)
        raise CheckpointError(f"it takes {num_bytes:,} bytes and the disk has {free_bytes:,} left")
    return secrets.token_hex(8)


def _write_shards(path: str, file_name: str, parts: Sequence[TensorPart]) -> _Part:
    sources: dict[str, _Source] = {part.name: (part.like(), part.blocks) for part in parts}
    if len(sources) != len(parts):
        raise ValueError(f"two shards of one rank share a name: {sorted(part.name for part in parts)}")
    for part in parts:
        if part.slots is not None:
            name = _slots_name(part.name)
            known, _ = sources.setdefault(name, (part.slots, functools.partial(row_blocks, part.slots)))
            if known is not part.slots:
                raise ValueError(f"{name!r} would name two tensors")
    entry, starts = _write_tensors(path, file_name, sources)
    shards = []
    for part in parts:
        piece = Piece(file_name, part.offset, part.num_rows, starts[part.name])
        if part.slots is not None:
            piece = replace(piece, span=part.span, slots_byte=starts[_slots_name(part.name)])
        shards.append((part.name, TensorInfo(part.global_shape, part.dtype, dict(part.layout), (piece,))))
    return _Part({file_name: entry}, shards)


def _slots_name(name: str) -> str:
    """Returns the name in a file of the numbers of a delta's rows: "item/slots" for "item/weight"."""
    return f"{name.rpartition('/')[0]}/slots"


def _write_tensors(path: str, file_name: str, sources: Mapping[str, _Source]) -> tuple[FileEntry, dict[str, int]]:
    """Writes a safetensors file in one pass; returns its entry and each tensor's first byte."""
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
    """Returns the manifest of the ranks' parts; CheckpointError where they do not tile their tensors."""
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
                f"{name} was written with {entry.bytes} bytes, and rank 0 finds "
                f"{found.get(name, 'no such file')}: the folder must be one that all ranks share"
            )


def _create_manifest(path: str, manifest: bytes, files: Iterable[str], attempt: str) -> None:
    """Commits. Where it fails unclearly the files stay, for the manifest may have come to be."""
    url = storage.join(path, MANIFEST_NAME)
    temporary_url = storage.join(path, temporary_manifest_name(attempt))
    try:
        storage.create(url, manifest, temporary_url)
    except FileExistsError as error:
        _discard(path, files)
        raise CheckpointError("another job completed this step meanwhile") from error


def _discard(path: str, names: Iterable[str]) -> None:
    """Removes files of a failed attempt as far as that works: its error is the one to tell."""
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
