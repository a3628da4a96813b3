"""Reading: any rows of a checkpoint, whatever number of ranks saved it, each byte checked on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from embedtrain.checkpoint import storage
from embedtrain.checkpoint.blocks import VerifiedFile
from embedtrain.checkpoint.header import as_bytes
from embedtrain.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    Piece,
    TensorInfo,
    canonical_json,
    decode,
)
from embedtrain.checkpoint.view import ShardView
from embedtrain.errors import CheckpointError, CorruptCheckpointError
from embedtrain.sharding.overlap import overlap

# Rows on their way to memory that a file cannot be read into, or out of a memory map, at a time.
_STAGED_BYTES = 16 * 2**20


def read_manifest(path: str) -> Manifest:
    """Returns the manifest of the checkpoint at `path`.

    Raises:
        CheckpointError: there is no complete checkpoint, or a newer embedtrain wrote it.
        CorruptCheckpointError: the manifest is not what was written.
    """
    url = storage.join(path, MANIFEST_NAME)
    try:
        data = storage.read(url)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no {MANIFEST_NAME}") from error
    except OSError as error:
        raise CheckpointError(f"{url} could not be read: {error}") from error
    return decode(data, url)


class CheckpointReader:
    """Reads rows of a complete checkpoint; no collective, every rank on its own.

    Nothing is read before it is asked for, and every byte is checked against its block's checksum before
    it is given out. Close it, or use it as a context.

    Attributes:
        path: folder of the checkpoint, any fsspec URL.
        manifest: what the checkpoint holds.

    Raises:
        CheckpointError: there is no complete checkpoint, or a newer embedtrain wrote it.
        CorruptCheckpointError: here and in the methods; names the file, the tensors and their rows.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._sizes = storage.list_files(path)
        self._files: dict[str, VerifiedFile] = {}
        self._maps: dict[str, npt.NDArray[np.uint8]] = {}
        self._downloads: tempfile.TemporaryDirectory[str] | None = None

    @property
    def step(self) -> int:
        """Returns the number of optimizer steps done."""
        return self.manifest.step

    @property
    def state(self) -> Mapping[str, Any]:
        """Returns the JSON that was saved with the tensors."""
        return self.manifest.state

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Returns shape, dtype and layout of each tensor that was cut over the ranks, by name."""
        return self.manifest.tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Returns rows `[start, stop)` of a tensor, on the CPU."""
        info = self._info(name)
        rows = torch.empty((max(0, stop - start), *info.shape[1:]), dtype=info.dtype)
        self.read_into(name, start, rows)
        return rows

    def read_into(self, name: str, start: int, destination: Tensor) -> None:
        """Fills `destination` with rows of a tensor from row `start` on, with tens of MiB beside it.

        Args:
            name: the tensor.
            start: its first row to read.
            destination: [rows, *shape[1:]] of the tensor's dtype, on any device.

        Raises:
            ValueError: the rows do not lie in the tensor, or `destination` has another shape or dtype.
        """
        info = self._info(name)
        if destination.dtype != info.dtype or tuple(destination.shape[1:]) != info.shape[1:]:
            raise ValueError(
                f"{name} is {info.dtype} {info.shape}; rows of it cannot be read into "
                f"{destination.dtype} {tuple(destination.shape)}"
            )
        if not 0 <= start <= start + len(destination) <= info.shape[0]:
            raise ValueError(f"{name} has rows [0, {info.shape[0]}); asked for [{start}, {start + len(destination)})")
        destination = destination.detach()
        if destination.device.type == "cpu" and destination.is_contiguous():
            self._read_bytes(info, start, destination)
            return
        for block in torch.split(destination, _rows_staged(info)):
            staged = torch.empty_like(block, device="cpu", memory_format=torch.contiguous_format)
            self._read_bytes(info, start, staged)
            block.copy_(staged)
            start += len(block)

    def gather(self, name: str, slots: Tensor) -> Tensor:
        """Returns rows of a tensor in any order, from a memory map of its files.

        A checkpoint that is not on a local disk has the files in question copied to a temporary folder,
        once per reader; `close` removes it.

        Args:
            name: the tensor.
            slots: [n] int64; rows of the tensor, in any order, repeated or not.

        Returns:
            [n, *shape[1:]] on the CPU.

        Raises:
            ValueError: `slots` is not a list of rows of the tensor.
        """
        info = self._info(name)
        if slots.dtype != torch.int64 or slots.dim() != 1:
            raise ValueError(f"slots must be [n] int64, got {slots.dtype} {tuple(slots.shape)}")
        if len(slots) and not 0 <= int(slots.min()) <= int(slots.max()) < info.shape[0]:
            raise ValueError(
                f"{name} has rows [0, {info.shape[0]}); asked for {int(slots.min())} to {int(slots.max())}"
            )
        gathered = torch.empty((len(slots), *info.shape[1:]), dtype=info.dtype)
        if gathered.numel():
            rows = np.frombuffer(as_bytes(gathered), dtype=np.uint8).reshape(len(slots), info.row_bytes)
            step = _rows_staged(info)
            for first in range(0, len(slots), step):
                part = slots[first : first + step].cpu().numpy()
                self._gather_bytes(info, part, rows[first : first + step])
        return gathered

    def replicated(self) -> dict[str, Tensor]:
        """Returns the tensors that all ranks share, by name, on the CPU."""
        name = self.manifest.replicated
        if name is None:
            return {}
        file = self._file(name)
        data = bytearray(file.num_bytes)
        file.read_into(0, memoryview(data))
        try:
            return safetensors.torch.load(bytes(data))
        except SafetensorError as error:
            raise CorruptCheckpointError(f"{file.url} is not a safetensors file: {error}") from error

    def close(self) -> None:
        """Gives back the memory maps and removes copies of remote files."""
        self._maps.clear()
        self._files.clear()
        if self._downloads is not None:
            self._downloads.cleanup()
            self._downloads = None

    def __enter__(self) -> CheckpointReader:
        """Returns the reader itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the reader."""
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.path} has no tensor {name!r}, but {sorted(self.manifest.tensors)}")
        return self.manifest.tensors[name]

    def _file(self, name: str) -> VerifiedFile:
        if name not in self._files:
            self._files[name] = VerifiedFile(self.path, name, self.manifest, self._sizes.get(name))
        return self._files[name]

    def _read_bytes(self, info: TensorInfo, start: int, destination: Tensor) -> None:
        for piece, first, last in _pieces_between(info, start, start + len(destination)):
            first_byte = piece.start_byte + (first - piece.offset) * info.row_bytes
            part = as_bytes(destination[first - start : last - start])
            self._file(piece.file).read_into(first_byte, part)

    def _gather_bytes(self, info: TensorInfo, slots: npt.NDArray[np.int64], destination: npt.NDArray[np.uint8]) -> None:
        """Fills `destination` [n, row_bytes] with the rows `slots` [n]."""
        stops = np.array([piece.offset + piece.rows for piece in info.pieces])
        piece_of_slot = np.searchsorted(stops, slots, side="right")
        for index in np.unique(piece_of_slot).tolist():
            piece = info.pieces[index]
            wanted = np.flatnonzero(piece_of_slot == index)
            rows = slots[wanted] - piece.offset
            mapped = self._mapped(piece.file)
            touched = self._touched_blocks(piece, rows, info.row_bytes)
            self._file(piece.file).verify_mapped(mapped, touched)
            stop_byte = piece.start_byte + piece.rows * info.row_bytes
            table = mapped[piece.start_byte : stop_byte].reshape(piece.rows, info.row_bytes)
            destination[wanted] = table[rows]

    def _touched_blocks(self, piece: Piece, rows: npt.NDArray[np.int64], row_bytes: int) -> npt.NDArray[np.bool_]:
        """Marks the blocks of the piece's file on which any of the piece's `rows` lies."""
        entry = self.manifest.files[piece.file]
        starts = piece.start_byte + rows * row_bytes
        # Between its first and its last block a row adds one; a running sum then counts rows per block.
        edges = np.zeros(len(entry.checksums) + 1, dtype=np.int64)
        np.add.at(edges, starts // entry.block_bytes, 1)
        np.add.at(edges, (starts + row_bytes - 1) // entry.block_bytes + 1, -1)
        return np.cumsum(edges)[:-1] > 0

    def _mapped(self, name: str) -> npt.NDArray[np.uint8]:
        if name not in self._maps:
            url = self._file(name).url
            path = storage.local_path(url) or self._download(url)
            self._maps[name] = np.memmap(path, dtype=np.uint8, mode="r")
        return self._maps[name]

    def _download(self, url: str) -> str:
        if self._downloads is None:
            self._downloads = tempfile.TemporaryDirectory(prefix="embedtrain-checkpoint-")
        path = str(Path(self._downloads.name) / storage.base_name(url))
        storage.download(url, path)
        return path


def load_shards(reader: CheckpointReader, shards: Sequence[ShardView]) -> None:
    """Fills the shards' tensors in place, whatever number of ranks saved the checkpoint.

    No collective; the shards of a rank name every tensor of the checkpoint, with zero rows where the rank
    holds none. Nothing is loaded where anything differs.

    Raises:
        CheckpointError: names, shapes, dtypes or layouts differ; the message lists all that do.
        CorruptCheckpointError: as in `CheckpointReader`; what was filled by then is not to be used.
    """
    differences = list(_differences(reader.tensors, shards))
    if differences:
        raise CheckpointError(f"{reader.path} does not fit the model:\n  " + "\n  ".join(differences))
    for view in shards:
        reader.read_into(view.name, view.offset, view.tensor)


def verify(path: str) -> None:
    """Checks every byte of a checkpoint.

    Raises:
        CorruptCheckpointError: names the first fault of each damaged file, its tensors and rows.
    """
    manifest = read_manifest(path)
    sizes = storage.list_files(path)
    faults = []
    for name in manifest.files:
        try:
            VerifiedFile(path, name, manifest, sizes.get(name)).verify()
        except CorruptCheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CorruptCheckpointError("\n".join(faults))


def _differences(tensors: Mapping[str, TensorInfo], shards: Sequence[ShardView]) -> Iterator[str]:
    expected = {view.name for view in shards}
    for name in sorted(expected - tensors.keys()):
        yield f"{name}: missing in the checkpoint"
    for name in sorted(tensors.keys() - expected):
        yield f"{name}: only in the checkpoint"
    for view in shards:
        info = tensors.get(view.name)
        if info is None:
            continue
        if info.shape != view.global_shape:
            yield f"{view.name}: shape {info.shape} in the checkpoint, {view.global_shape} in the model"
        if info.dtype != view.tensor.dtype:
            yield f"{view.name}: {info.dtype} in the checkpoint, {view.tensor.dtype} in the model"
        if canonical_json(info.layout) != canonical_json(view.layout):
            yield f"{view.name}: layout {info.layout} in the checkpoint, {dict(view.layout)} in the model"


def _pieces_between(info: TensorInfo, start: int, stop: int) -> Iterator[tuple[Piece, int, int]]:
    """Yields the pieces that hold any of the rows, each with the first row and the end of those it holds."""
    for piece in info.pieces:
        shared = overlap((start, stop), (piece.offset, piece.offset + piece.rows))
        if shared is not None:
            yield piece, *shared


def _rows_staged(info: TensorInfo) -> int:
    return max(1, _STAGED_BYTES // max(1, info.row_bytes))
