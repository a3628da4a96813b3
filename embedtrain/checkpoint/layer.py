"""One checkpoint of a chain: reads its rows and writes them over the rows of earlier checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedtrain import storage
from embedtrain.checkpoint.blocks import VerifiedFile
from embedtrain.checkpoint.header import as_bytes
from embedtrain.checkpoint.manifest import Manifest, Piece, TensorInfo
from embedtrain.errors import CorruptCheckpointError
from embedtrain.sharding.layout import overlap

# Size of the buffer for rows that must be converted, moved to a device or gathered.
_STAGED_BYTES = 16 * 2**20
_STAGED_SLOTS = 2**19


class Layer:
    """Reads the files of one checkpoint and checks every byte before it returns it.

    Args:
        path: folder of the checkpoint.
        manifest: its manifest.

    Raises:
        CorruptCheckpointError: raised by the methods; names the file, the tensors and their rows.
    """

    def __init__(self, path: str, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._sizes = storage.list_files(path)
        self._files: dict[str, VerifiedFile] = {}
        self._maps: dict[str, npt.NDArray[np.uint8]] = {}
        self._downloads: tempfile.TemporaryDirectory[str] | None = None

    def lay_over(self, name: str, start: int, destination: Tensor) -> None:
        """Overwrites the rows of `destination` that this checkpoint holds.

        Args:
            name: the tensor.
            start: the tensor's row that belongs in row 0 of `destination`.
            destination: [rows, *shape[1:]] on any device; values are converted to its dtype.
        """
        info = self.manifest.tensors[name]
        for piece in info.pieces:
            shared = overlap((start, start + len(destination)), (piece.offset, piece.stop))
            if shared is None:
                continue
            if piece.slots_byte is None:
                first = piece.start_byte + (shared[0] - piece.offset) * info.row_bytes
                self._read_rows(info, piece.file, first, destination[shared[0] - start : shared[1] - start])
            else:
                self._read_changes(info, piece, start, destination)

    def lay_over_gathered(self, name: str, slots: npt.NDArray[np.int64], destination: npt.NDArray[np.uint8]) -> None:
        """Copies rows `slots` [n], as far as this checkpoint holds them, to `destination` [n, row_bytes].

        Reads from a memory map of the files.
        """
        info = self.manifest.tensors[name]
        stops = np.array([piece.stop for piece in info.pieces])
        piece_of_slot = np.searchsorted(stops, slots, side="right")
        for index in np.unique(piece_of_slot).tolist():
            piece = info.pieces[index]
            wanted = np.flatnonzero(piece_of_slot == index)
            if piece.slots_byte is None:
                rows = slots[wanted] - piece.offset
            else:
                wanted, rows = self._find_changes(piece, piece.slots_byte, slots, wanted)
            table = self._mapped_table(piece.file, piece.start_byte, piece.rows, info.row_bytes, rows)
            destination[wanted] = table[rows]

    def read_file(self, name: str) -> bytes:
        """Returns the bytes of a whole file."""
        file = self._file(name)
        data = bytearray(file.num_bytes)
        file.read_into(0, memoryview(data))
        return bytes(data)

    def verify(self) -> list[str]:
        """Checks every byte and returns the first fault of each damaged file."""
        faults = []
        for name in self.manifest.files:
            try:
                self._file(name).verify()
            except CorruptCheckpointError as error:
                faults.append(str(error))
        return faults

    def close(self) -> None:
        """Closes the files, releases the memory maps and removes temporary copies of remote files."""
        for file in self._files.values():
            file.close()
        self._maps.clear()
        self._files.clear()
        if self._downloads is not None:
            self._downloads.cleanup()
            self._downloads = None

    def _file(self, name: str) -> VerifiedFile:
        if name not in self._files:
            self._files[name] = VerifiedFile(self.path, name, self.manifest, self._sizes.get(name))
        return self._files[name]

    def _read_rows(self, info: TensorInfo, file: str, first_byte: int, destination: Tensor) -> None:
        """Fills `destination` with consecutive rows, directly if it is a contiguous CPU tensor of the same dtype."""
        if destination.device.type == "cpu" and destination.is_contiguous() and destination.dtype == info.dtype:
            self._file(file).read_into(first_byte, as_bytes(destination))
            return
        for block in torch.split(destination, rows_staged(info)):
            staged = torch.empty(block.shape, dtype=info.dtype)
            self._file(file).read_into(first_byte, as_bytes(staged))
            block.copy_(staged)
            first_byte += staged.nbytes

    def _read_changes(self, info: TensorInfo, piece: Piece, start: int, destination: Tensor) -> None:
        """Overwrites the rows of `destination` that `piece` of a delta holds, in blocks."""
        stop = start + len(destination)
        for first, slots in self._slots(piece):
            lower, upper = np.searchsorted(slots, [start, stop]).tolist()
            for begin in range(lower, upper, rows_staged(info)):
                some = torch.from_numpy(slots[begin : min(upper, begin + rows_staged(info))] - start)
                rows = torch.empty((len(some), *info.shape[1:]), dtype=info.dtype)
                first_byte = piece.start_byte + (first + begin) * info.row_bytes
                self._file(piece.file).read_into(first_byte, as_bytes(rows))
                rows = rows.to(destination.device, destination.dtype)
                destination.index_copy_(0, some.to(destination.device), rows)

    def _slots(self, piece: Piece) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
        """Yields blocks of the row numbers of a delta's piece, each with the index of its first row number."""
        previous = piece.offset - 1
        for first in range(0, piece.rows, _STAGED_SLOTS):
            slots = np.empty(min(_STAGED_SLOTS, piece.rows - first), dtype=np.int64)
            self._file(piece.file).read_into((piece.slots_byte or 0) + 8 * first, slots.view(np.uint8).data)
            self._check_slots(piece, slots, previous)
            previous = int(slots[-1])
            yield first, slots

    def _find_changes(
        self, piece: Piece, slots_byte: int, slots: npt.NDArray[np.int64], wanted: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Returns the indices of `wanted` whose slots the delta holds, and the positions of these rows in the delta."""
        if piece.rows == 0:
            return wanted[:0], wanted[:0]
        every = np.arange(piece.rows)
        changed = self._mapped_table(piece.file, slots_byte, piece.rows, 8, every).view(np.int64)[:, 0]
        self._check_slots(piece, changed, piece.offset - 1)
        place = np.minimum(np.searchsorted(changed, slots[wanted]), piece.rows - 1)
        is_here = changed[place] == slots[wanted]
        return wanted[is_here], place[is_here]

    def _check_slots(self, piece: Piece, slots: npt.NDArray[np.int64], previous: int) -> None:
        if slots[0] <= previous or slots[-1] >= piece.stop or bool((np.diff(slots) <= 0).any()):
            raise CorruptCheckpointError(
                f"{storage.join(self.path, piece.file)}: row numbers do not ascend or lie outside "
                f"[{piece.offset}, {piece.stop})"
            )

    def _mapped_table(
        self, name: str, start_byte: int, num_rows: int, row_bytes: int, rows: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.uint8]:
        """Returns a memory map [num_rows, row_bytes] after checking the blocks that hold `rows`."""
        if name not in self._maps:
            url = self._file(name).url
            path = storage.local_path(url) or self._download(url)
            self._maps[name] = np.memmap(path, dtype=np.uint8, mode="r")
        mapped = self._maps[name]
        self._file(name).verify_mapped(mapped, self._touched_blocks(name, start_byte, rows, row_bytes))
        return mapped[start_byte : start_byte + num_rows * row_bytes].reshape(num_rows, row_bytes)

    def _touched_blocks(
        self, name: str, start_byte: int, rows: npt.NDArray[np.int64], row_bytes: int
    ) -> npt.NDArray[np.bool_]:
        """Returns a mask [num_blocks] of the blocks of a file that hold any byte of `rows`."""
        entry = self.manifest.files[name]
        starts = start_byte + rows * row_bytes
        # Each row adds 1 at its first block and subtracts 1 after its last: the running sum counts rows per block.
        edges = np.zeros(len(entry.checksums) + 1, dtype=np.int64)
        np.add.at(edges, starts // entry.block_bytes, 1)
        np.add.at(edges, (starts + row_bytes - 1) // entry.block_bytes + 1, -1)
        return np.cumsum(edges)[:-1] > 0

    def _download(self, url: str) -> str:
        if self._downloads is None:
            self._downloads = tempfile.TemporaryDirectory(prefix="embedtrain-checkpoint-")
        path = str(Path(self._downloads.name) / storage.base_name(url))
        storage.download(url, path)
        return path


def rows_staged(info: TensorInfo) -> int:
    """Returns how many rows fit into the buffer for rows that are converted, moved or gathered."""
    return max(1, _STAGED_BYTES // max(1, info.row_bytes))
