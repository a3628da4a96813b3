"""The manifest: the table of contents of a checkpoint. A checkpoint is complete when its manifest exists.

The names of the files and the JSON of the manifest are a public format, declared only here. The folder of a
step holds

    shard-<attempt>-00003-of-00008.safetensors    one per rank
    replicated-<attempt>.safetensors              only if there are tensors that all ranks share
    manifest.json                                 created atomically by rank 0 after all other files

The attempt is a random word. It tells files of a killed save from files of a later save of the same step.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
import xxhash
from pydantic import Field, PlainValidator

from embedtrain.checkpoint.header import DTYPES
from embedtrain.errors import CheckpointError, CorruptCheckpointError
from embedtrain.schema import LARGEST, Count, Positive, declared, parse
from embedtrain.sharding.layout import MAX_ROWS, overlap

FORMAT = "embedtrain-checkpoint"
VERSION = 1
DELTA_VERSION = 2
"""Version of a delta's manifest: a reader that knows only full checkpoints must refuse it."""
MANIFEST_NAME = "manifest.json"
BLOCK_BYTES = 4 * 2**20
MAX_DIMENSIONS = 64
"""Maximum number of dimensions of a tensor, as in torch."""

_MAX_BLOCK_BYTES = 2**30
"""Bounds a reader's memory: it holds one whole block."""

_STEP_FOLDER = re.compile(r"step-(\d{9,})")
_TENSOR_FILE = re.compile(
    r"shard-(?P<shard>[0-9a-f]{16})-\d{5,}-of-\d{5,}\.safetensors|replicated-(?P<replicated>[0-9a-f]{16})\.safetensors"
)
_TEMPORARY_FILE = re.compile(r"manifest-[0-9a-f]{16}\.tmp")


def step_folder_name(step: int) -> str:
    """Returns the name of the folder of a step's checkpoint."""
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    return f"step-{step:09d}"


def step_of(folder_name: str) -> int | None:
    """Returns the step that a folder's name stands for, or None if it is not the name of a step folder."""
    match = _STEP_FOLDER.fullmatch(folder_name)
    return int(match[1]) if match and step_folder_name(int(match[1])) == folder_name else None


def shard_file_name(attempt: str, rank: int, world_size: int) -> str:
    """Returns the name of the file that holds a rank's shards."""
    return f"shard-{attempt}-{rank:05d}-of-{world_size:05d}.safetensors"


def replicated_file_name(attempt: str) -> str:
    """Returns the name of the file that holds the tensors all ranks share."""
    return f"replicated-{attempt}.safetensors"


def temporary_manifest_name(attempt: str) -> str:
    """Returns the name under which a manifest is written before it is linked to its final name."""
    return f"manifest-{attempt}.tmp"


def is_attempt_file(name: str) -> bool:
    """Returns whether a file is one that a save writes before it commits."""
    return bool(_TENSOR_FILE.fullmatch(name) or _TEMPORARY_FILE.fullmatch(name))


def _dtype(name: object) -> torch.dtype:
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


Checksum = Annotated[str, Field(strict=True, pattern="^[0-9a-f]{32}$")]
Size = Annotated[int, Field(strict=True, ge=0, le=MAX_ROWS)]
Factor = Annotated[int, Field(strict=True, ge=1, le=MAX_ROWS)]


@dataclass(frozen=True)
class Piece:
    """Locates rows of a tensor in a file; their bytes begin at byte `start_byte` of `file`.

    In a full checkpoint a piece holds the rows `[offset, offset + rows)`. In a delta it holds `rows` rows out of
    `[offset, offset + span)`; their row numbers begin at byte `slots_byte` of the same file, as ascending
    little-endian int64.
    """

    file: str
    offset: Count
    rows: Count
    start_byte: Count
    span: Count | None = None
    slots_byte: Count | None = None

    @property
    def stop(self) -> int:
        """Returns the row after the last row of the range."""
        return self.offset + (self.rows if self.span is None else self.span)


@dataclass(frozen=True)
class Parent:
    """Identifies the checkpoint that a delta changes: its step, and the checksum of its manifest."""

    step: Count
    checksum: Checksum


@dataclass(frozen=True)
class _SpreadLayout:
    """Describes a `SpreadLayout` in a manifest."""

    kind: Literal["spread"]
    multiplier: Factor
    block_rows: Factor = 1


@declared
@dataclass(frozen=True)
class TensorInfo:
    """Describes a tensor of a checkpoint.

    Attributes:
        shape: shape of the whole tensor.
        dtype: dtype of its elements, as saved.
        layout: see `ShardView`.
        pieces: where its rows are stored, in row order; no piece is empty.
    """

    shape: Annotated[tuple[Size, ...], Field(min_length=1, max_length=MAX_DIMENSIONS)]
    dtype: Annotated[torch.dtype, PlainValidator(_dtype)]
    layout: Mapping[str, Any]
    pieces: tuple[Piece, ...]

    @property
    def row_bytes(self) -> int:
        """Returns the size of a row in bytes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class FileEntry:
    """Holds a file's size and the xxh3_128 checksum, in hex, of each of its blocks of `block_bytes` bytes."""

    bytes: Count
    block_bytes: Annotated[int, Field(strict=True, ge=1, le=_MAX_BLOCK_BYTES)]
    checksums: tuple[Checksum, ...]


@dataclass(frozen=True)
class Manifest:
    """Describes a checkpoint. The annotations are the schema that a `manifest.json` is checked against.

    Attributes:
        step: number of optimizer steps done.
        created: UTC time in ISO 8601.
        versions: versions of "embedtrain" and "torch" that wrote the checkpoint.
        world_size: number of ranks that saved it.
        tensors: the sharded tensors, by name.
        replicated: name of the file that holds the tensors all ranks share, or None if there are none.
        files: every file except the manifest, by name.
        state: other state of the run, as JSON.
        parent: the checkpoint that this delta changes; None for a full checkpoint.
        table_steps: number of optimizer steps per table; see `ShardView.steps`.
    """

    step: Count
    created: str
    versions: Mapping[str, str]
    world_size: Positive
    tensors: Mapping[str, TensorInfo]
    replicated: str | None
    files: Mapping[str, FileEntry]
    state: Mapping[str, Any]
    parent: Parent | None = None
    table_steps: Mapping[str, Count] = field(default_factory=dict)

    @functools.cached_property
    def checksum(self) -> str:
        """Returns the checksum of the manifest, which identifies the checkpoint."""
        return _checksum(_document(self))

    def contents(self, file: str, start_byte: int, stop_byte: int) -> str:
        """Returns a description of a byte range of a file: the tensors and rows stored in it."""
        if file == self.replicated:
            return "the tensors that all ranks share"
        found = []
        for name, info in self.tensors.items():
            for piece in info.pieces:
                first = start_byte - piece.start_byte
                last = stop_byte - piece.start_byte
                size = piece.rows * info.row_bytes
                shared = overlap((first, last), (0, size)) if piece.file == file else None
                if shared is not None and piece.slots_byte is not None:
                    found.append(f"{name} rows among [{piece.offset}, {piece.stop})")
                elif shared is not None:
                    start = piece.offset + shared[0] // info.row_bytes
                    stop = piece.offset - (-shared[1] // info.row_bytes)
                    found.append(f"{name} rows [{start}, {stop})")
        if not found and self.parent is not None:
            return "row numbers of the delta"
        if not found:
            return "no rows"
        return ", ".join(found)


def merge_pieces(shards: list[tuple[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """Merges the ranks' pieces into whole tensors and returns them by name.

    Args:
        shards: for each piece its tensor's name, and the tensor's description with this piece only.

    Raises:
        CheckpointError: pieces disagree on shape, dtype or layout, or they leave a gap or overlap.
    """
    merged: dict[str, TensorInfo] = {}
    for name, info in shards:
        known = merged.setdefault(name, replace(info, pieces=()))
        if (known.shape, known.dtype, known.layout) != (info.shape, info.dtype, info.layout):
            raise CheckpointError(
                f"ranks disagree on {name}: {known.dtype} {known.shape} {known.layout} "
                f"and {info.dtype} {info.shape} {info.layout}"
            )
        pieces = (*known.pieces, *(piece for piece in info.pieces if piece.stop > piece.offset))
        merged[name] = replace(known, pieces=tuple(sorted(pieces, key=lambda piece: piece.offset)))
    for name, info in merged.items():
        _check_tiling(name, info)
    return dict(sorted(merged.items()))


def canonical_json(value: Mapping[str, Any]) -> bytes:
    """Returns the canonical form of a JSON object, of which checksums are taken: ASCII, sorted keys, no spaces.

    Raises:
        ValueError: the object has a type or a number (infinity, NaN) that JSON does not have.
    """
    try:
        return json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except TypeError as error:
        raise ValueError(str(error)) from error


def encode(manifest: Manifest) -> bytes:
    """Returns the bytes of `manifest.json`; ValueError if the state or a layout cannot be written as JSON."""
    return canonical_json({**_document(manifest), "checksum": manifest.checksum})


def decode(data: bytes, url: str) -> Manifest:
    """Decodes and checks the bytes of a `manifest.json`.

    The fields "format", "version" and "checksum" mean the same in every version, so that a damaged manifest is
    told apart from one of a newer version.

    Raises:
        CorruptCheckpointError: the bytes are damaged, or the fields contradict one another.
        CheckpointError: the manifest has a format version that this embedtrain does not know.
    """
    try:
        document = json.loads(data)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CorruptCheckpointError(f"{url} is not the manifest of an embedtrain checkpoint")
        if document.pop("checksum", None) != _checksum(document):
            raise CorruptCheckpointError(f"{url} is damaged: its checksum differs")
    except (ValueError, RecursionError) as error:
        raise CorruptCheckpointError(f"{url} is not JSON: {error}") from error
    if document.get("version") not in (VERSION, DELTA_VERSION):
        raise CheckpointError(
            f"{url} has format version {document.get('version')}, and this embedtrain reads versions {VERSION} and "
            f"{DELTA_VERSION}: use the version of embedtrain that wrote it, or a newer one"
        )
    try:
        manifest = parse(Manifest, document)
        _check(manifest, document["version"])
    except (ValueError, CheckpointError) as error:
        raise CorruptCheckpointError(f"{url} contradicts itself: {error}") from error
    return manifest


def _checksum(document: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(canonical_json(document))


def _document(manifest: Manifest) -> dict[str, Any]:
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION if manifest.parent is None else DELTA_VERSION,
        **{key: getattr(manifest, key) for key in ("step", "created", "world_size", "replicated")},
        "versions": dict(manifest.versions),
        "tensors": {name: _encode_tensor(info) for name, info in manifest.tensors.items()},
        "files": {name: asdict(entry) for name, entry in manifest.files.items()},
        "state": dict(manifest.state),
    }
    if manifest.parent is not None:
        document["parent"] = asdict(manifest.parent)
    if manifest.table_steps:  # Absent in checkpoints of earlier versions.
        document["table_steps"] = dict(manifest.table_steps)
    return document


def _encode_tensor(info: TensorInfo) -> dict[str, Any]:
    return {
        "shape": list(info.shape),
        "dtype": str(info.dtype).removeprefix("torch."),
        "layout": dict(info.layout),
        "pieces": [{key: value for key, value in asdict(piece).items() if value is not None} for piece in info.pieces],
    }


def _check(manifest: Manifest, version: int) -> None:
    """Checks what the schema cannot: file names, byte ranges inside their files, and each row stored once.

    Raises:
        ValueError, CheckpointError: names the file or the tensor.
    """
    for name, entry in manifest.files.items():
        if not _TENSOR_FILE.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a checkpoint file")
        if len(entry.checksums) != -(-entry.bytes // entry.block_bytes):
            raise ValueError(
                f"{name}: {len(entry.checksums)} checksums for {entry.bytes} bytes in blocks of {entry.block_bytes}"
            )
    for name, info in manifest.tensors.items():
        _check_shape(name, info)
        _check_tiling(name, info)
        for piece in info.pieces:
            _check_piece(name, info.row_bytes, piece, manifest)
    if (manifest.parent is not None) != (version == DELTA_VERSION):
        raise ValueError(f"version {version} does not match parent {manifest.parent}")
    if manifest.parent is not None and manifest.parent.step >= manifest.step:
        raise ValueError(f"step {manifest.step} has the parent step {manifest.parent.step}, which must be earlier")
    if manifest.replicated is not None and manifest.replicated not in manifest.files:
        raise ValueError(f"{manifest.replicated!r} has no checksums")


def _check_shape(name: str, info: TensorInfo) -> None:
    if 0 in info.shape[1:] or math.prod(info.shape) * info.dtype.itemsize > LARGEST:
        sizes = " x ".join(map(str, info.shape))
        raise ValueError(
            f"{name!r}: rows must have at least 1 element and the tensor at most 2**63 bytes, got shape {sizes}"
        )
    if info.layout.get("kind") == "spread":
        try:
            parse(_SpreadLayout, dict(info.layout))
        except ValueError as error:
            raise ValueError(f"{name!r}: layout: {error}") from error


def _check_piece(name: str, row_bytes: int, piece: Piece, manifest: Manifest) -> None:
    if piece.file not in manifest.files:
        raise ValueError(f"{name!r}: {piece.file!r} has no checksums")
    num_bytes = manifest.files[piece.file].bytes
    if piece.start_byte + piece.rows * row_bytes > num_bytes:
        raise ValueError(f"{name!r}: {piece} ends after its file of {num_bytes} bytes")
    if (piece.span is None) != (piece.slots_byte is None):
        raise ValueError(f"{name!r}: {piece} has only one of span and slots_byte")
    if piece.slots_byte is not None:
        if piece.slots_byte + piece.rows * 8 > num_bytes:
            raise ValueError(f"{name!r}: the row numbers of {piece} end after its file of {num_bytes} bytes")
        if manifest.parent is None or piece.rows > piece.stop - piece.offset:
            raise ValueError(
                f"{name!r}: {piece} has row numbers, but the checkpoint is full or the piece exceeds its span"
            )


def _check_tiling(name: str, info: TensorInfo) -> None:
    """Raises CheckpointError unless the pieces, in row order, hold each row exactly once."""
    row = 0
    for piece in info.pieces:
        if piece.offset != row or piece.stop <= piece.offset:
            fault = "are stored twice" if piece.offset < row else "are missing"
            start, stop = sorted((row, piece.offset))
            raise CheckpointError(f"{name}: rows [{start}, {stop}) {fault} before {piece.file}")
        row = piece.stop
    if row != info.shape[0]:
        raise CheckpointError(f"{name}: the pieces end at row {row} of {info.shape[0]}")
