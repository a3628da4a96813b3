"""Saving: every rank writes its shard, then rank 0 makes the checkpoint exist by creating the manifest."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from embedtrain.checkpoint import storage
from embedtrain.checkpoint.agreement import on_every_rank, on_first_rank
from embedtrain.checkpoint.blocks import BlockHasher
from embedtrain.checkpoint.header import byte_blocks, encode_header
from embedtrain.checkpoint.manifest import (
    MANIFEST_NAME,
    FileEntry,
    Manifest,
    Piece,
    TensorInfo,
    canonical_json,
    encode,
    merge_pieces,
    replicated_file_name,
    shard_file_name,
    step_folder_name,
    temporary_manifest_name,
)
from embedtrain.checkpoint.view import ShardView
from embedtrain.distributed.runtime import rank_of, size_of
from embedtrain.errors import CheckpointError, UserError


def save_checkpoint(
    checkpoints_path: str,
    step: int,
    shards: Sequence[ShardView],
    state: Mapping[str, Any],
    group: dist.ProcessGroup | None,
    replicated: Mapping[str, Tensor] | None = None,
) -> str:
    """Saves a checkpoint, which exists as a whole on return and not at all before its last act.

    Collective: every rank of `group`. The files are durable and checked for their size before the
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
            tensors, the state is not JSON, or a rank could not write.
    """
    path = storage.join(checkpoints_path, step_folder_name(step))
    doing = f"step {step} was not saved to {path}"
    attempt = on_first_rank(doing, lambda: _begin(path, state), group)
    rank, world_size = rank_of(group), size_of(group)
    shard_file = shard_file_name(attempt, rank, world_size)
    replicated_file = replicated_file_name(attempt) if replicated and rank == 0 else None

    def write_part() -> _Part:
        part = _write_shards(path, shard_file, shards)
        if replicated_file is not None:
            part.files[replicated_file] = _write_tensors(path, replicated_file, replicated or {})[0]
        return part

    try:
        parts = on_every_rank(doing, write_part, group)
    except (CheckpointError, UserError):
        # All ranks know of this failure. After any other, rank 0 may have gone on to commit this file.
        _discard(path, [name for name in (shard_file, replicated_file) if name])
        raise

    def commit() -> None:
        files = {name: entry for part in parts for name, entry in part.files.items()}
        try:
            _check_sizes(path, files)
            manifest = encode(_assemble(parts, files, step, state, replicated_file))
        except Exception:
            _discard(path, files)
            raise
        _create_manifest(path, manifest, files, attempt)

    on_first_rank(doing, commit, group)
    return path


@dataclass(frozen=True)
class _Part:
    """What a rank has written.

    Attributes:
        files: entries of its files, by name.
        shards: for each of its shards the tensor's name, and the tensor with this piece alone.
    """

    files: dict[str, FileEntry]
    shards: list[tuple[str, TensorInfo]]


def _begin(path: str, state: Mapping[str, Any]) -> str:
    """Makes the folder and returns the name of this attempt."""
    if MANIFEST_NAME in storage.list_files(path):
        raise CheckpointError("it is complete already, and a complete checkpoint is never overwritten")
    canonical_json(state)
    storage.make_folder(path)
    return secrets.token_hex(8)


def _write_shards(path: str, file_name: str, shards: Sequence[ShardView]) -> _Part:
    tensors = {view.name: view.tensor for view in shards}
    if len(tensors) != len(shards):
        raise ValueError(f"two shards of one rank share a name: {sorted(view.name for view in shards)}")
    entry, starts = _write_tensors(path, file_name, tensors)
    parts = []
    for view in shards:
        piece = Piece(file_name, view.offset, len(view.tensor), starts[view.name])
        info = TensorInfo(view.global_shape, view.tensor.dtype, dict(view.layout), (piece,))
        parts.append((view.name, info))
    return _Part({file_name: entry}, parts)


def _write_tensors(path: str, file_name: str, tensors: Mapping[str, Tensor]) -> tuple[FileEntry, dict[str, int]]:
    """Writes a safetensors file in one pass; returns its entry and each tensor's first byte."""
    header, starts = encode_header(tensors)

    def chunks() -> Iterator[bytes | memoryview]:
        yield header
        for name in starts:
            yield from byte_blocks(tensors[name])

    hasher = BlockHasher()
    storage.write(storage.join(path, file_name), hasher.passing(chunks))
    return hasher.entry(), starts


def _assemble(
    parts: Sequence[_Part],
    files: Mapping[str, FileEntry],
    step: int,
    state: Mapping[str, Any],
    replicated_file: str | None,
) -> Manifest:
    """Returns the manifest of the ranks' parts; CheckpointError where they do not tile their tensors."""
    return Manifest(
        step=step,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={"embedtrain": _own_version(), "torch": torch.__version__},
        world_size=len(parts),
        tensors=merge_pieces([shard for part in parts for shard in part.shards]),
        replicated=replicated_file,
        files=files,
        state=state,
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


def _own_version() -> str:
    try:
        return version("embedtrain")
    except PackageNotFoundError:
        return "not installed"
