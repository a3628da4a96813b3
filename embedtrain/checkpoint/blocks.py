"""Checksums per block of a file: computed while the file is written, checked while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from embedtrain import storage
from embedtrain.checkpoint.manifest import BLOCK_BYTES, FileEntry, Manifest
from embedtrain.errors import CheckpointError, CorruptCheckpointError


class BlockHasher:
    """Computes the block checksums of a file while its chunks are written."""

    def __init__(self) -> None:
        self._reset()

    def passing(self, chunks: Callable[[], Iterable[bytes | memoryview]]) -> Iterable[bytes | memoryview]:
        """Returns an iterable that hashes each chunk of `chunks()` and then yields it.

        A second iteration calls `chunks()` again and starts the checksums anew.
        """
        return _Passing(self, chunks)

    def entry(self) -> FileEntry:
        """Returns the manifest entry of the file that was written."""
        open_block = [self._block.hexdigest()] if self._size % BLOCK_BYTES else []
        return FileEntry(self._size, BLOCK_BYTES, tuple(self._checksums + open_block))

    def _reset(self) -> None:
        self._size = 0
        self._checksums: list[str] = []
        self._block = xxhash.xxh3_128()

    def _update(self, chunk: memoryview) -> None:
        while len(chunk):
            taken = chunk[: BLOCK_BYTES - self._size % BLOCK_BYTES]
            self._block.update(taken)
            self._size += len(taken)
            chunk = chunk[len(taken) :]
            if self._size % BLOCK_BYTES == 0:
                self._checksums.append(self._block.hexdigest())
                self._block.reset()


class _Passing:
    """Yields chunks through a `BlockHasher`; each iteration resets the hasher, so a write can be retried."""

    def __init__(self, hasher: BlockHasher, chunks: Callable[[], Iterable[bytes | memoryview]]) -> None:
        self._hasher = hasher
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes | memoryview]:
        self._hasher._reset()
        for chunk in self._chunks():
            self._hasher._update(memoryview(chunk))
            yield chunk


class VerifiedFile:
    """Reads a file of a checkpoint and checks the checksum of a block before it returns bytes of that block.

    A block is checked on its first read. Besides the caller's buffer, one block is held in memory. The file stays
    open until `close`.

    Raises:
        CorruptCheckpointError: the file is missing or has another size than the manifest says.
    """

    def __init__(self, folder: str, name: str, manifest: Manifest, size: int | None) -> None:
        self.url = storage.join(folder, name)
        self._reader = storage.RangeReader(self.url)
        self._name = name
        self._manifest = manifest
        self._entry = manifest.files[name]
        self._verified = np.zeros(len(self._entry.checksums), dtype=bool)
        if size != self._entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes instead of {self._entry.bytes}"
            raise CorruptCheckpointError(
                f"{self.url} {found}; affected: {manifest.contents(name, 0, self._entry.bytes)}"
            )

    @property
    def num_bytes(self) -> int:
        """Returns the size of the file."""
        return self._entry.bytes

    def read_into(self, start: int, destination: memoryview) -> None:
        """Fills `destination` with bytes of the file, beginning at byte `start`.

        Raises:
            CorruptCheckpointError: bytes are missing, or a block's checksum differs.
        """
        stop = start + len(destination)
        while start < stop:
            block = start // self._entry.block_bytes
            block_start, block_stop = self._bounds(block)
            part = destination[: min(stop, block_stop) - start]
            if len(part) == block_stop - block_start:
                self._fetch(block_start, part)
                self._check(block, part)
            elif self._verified[block]:
                self._fetch(start, part)
            else:
                whole = memoryview(bytearray(block_stop - block_start))
                self._fetch(block_start, whole)
                self._check(block, whole)
                part[:] = whole[start - block_start :][: len(part)]
            start += len(part)
            destination = destination[len(part) :]

    def verify(self) -> None:
        """Checks every block of the file, including blocks that were checked before."""
        scratch = memoryview(bytearray(min(self._entry.block_bytes, self._entry.bytes)))
        try:
            for block in range(len(self._verified)):
                start, stop = self._bounds(block)
                self._fetch(start, scratch[: stop - start])
                self._check(block, scratch[: stop - start])
        finally:
            self.close()

    def verify_mapped(self, mapped: npt.NDArray[np.uint8], touched: npt.NDArray[np.bool_]) -> None:
        """Checks the blocks marked in `touched` [num_blocks] in a memory map of the whole file."""
        for block in np.flatnonzero(touched & ~self._verified).tolist():
            start, stop = self._bounds(block)
            self._check(block, mapped[start:stop].data)

    def close(self) -> None:
        """Closes the file; the next read opens it again."""
        self._reader.close()

    def _bounds(self, block: int) -> tuple[int, int]:
        start = block * self._entry.block_bytes
        return start, min(start + self._entry.block_bytes, self._entry.bytes)

    def _fetch(self, start: int, destination: memoryview) -> None:
        try:
            count = self._reader.read_into(start, destination)
        except FileNotFoundError:
            count = 0
        except OSError as error:
            raise CheckpointError(f"cannot read {self.url}: {error}") from error
        if count != len(destination):
            self._refuse(start, start + len(destination), "are missing")

    def _check(self, block: int, data: memoryview) -> None:
        if xxhash.xxh3_128_hexdigest(data) != self._entry.checksums[block]:
            self._refuse(*self._bounds(block), "are damaged (the checksum differs)")
        self._verified[block] = True

    def _refuse(self, start: int, stop: int, fault: str) -> None:
        raise CorruptCheckpointError(
            f"{self.url}: bytes {start} to {stop} {fault}; affected: {self._manifest.contents(self._name, start, stop)}"
        )
