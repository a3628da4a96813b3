"""Files as blocks with checksums: computed while a file is written, checked while it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt
import xxhash

from embedtrain import storage
from embedtrain.checkpoint.manifest import BLOCK_BYTES, FileEntry, Manifest
from embedtrain.errors import CheckpointError, CorruptCheckpointError


class BlockHasher:
    """Computes the block checksums of a file from the chunks that pass through on their way to it."""

    def __init__(self) -> None:
        self._reset()

    def passing(self, chunks: Callable[[], Iterable[bytes | memoryview]]) -> Iterable[bytes | memoryview]:
        """Returns the chunks that `chunks()` yields, each taken into account first; they can be had again."""
        return _Passing(self, chunks)

    def entry(self) -> FileEntry:
        """Returns the manifest's entry for the file whose chunks have passed."""
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
    """Chunks on their way through a `BlockHasher`; a writer that begins anew has it begin anew."""

    def __init__(self, hasher: BlockHasher, chunks: Callable[[], Iterable[bytes | memoryview]]) -> None:
        self._hasher = hasher
        self._chunks = chunks

    def __iter__(self) -> Iterator[bytes | memoryview]:
        self._hasher._reset()
        for chunk in self._chunks():
            self._hasher._update(memoryview(chunk))
            yield chunk


class VerifiedFile:
    """A file of a checkpoint that gives out only bytes whose block's checksum was checked.

    A block is checked when it is first touched. Besides the caller's memory, one block is held. The file stays
    open until it is closed.

    Raises:
        CorruptCheckpointError: the file is missing or not as long as it was written.
    """

    def __init__(self, folder: str, name: str, manifest: Manifest, size: int | None) -> None:
        self.url = storage.join(folder, name)
        self._reader = storage.RangeReader(self.url)
        self._name = name
        self._manifest = manifest
        self._entry = manifest.files[name]
        self._verified = np.zeros(len(self._entry.checksums), dtype=bool)
        if size != self._entry.bytes:
            found = "is missing" if size is None else f"has {size} bytes, {self._entry.bytes} were written"
            raise CorruptCheckpointError(
                f"{self.url} {found}: it holds {manifest.contents(name, 0, self._entry.bytes)}"
            )

    @property
    def num_bytes(self) -> int:
        """Returns the length of the file."""
        return self._entry.bytes

    def read_into(self, start: int, destination: memoryview) -> None:
        """Fills `destination` with the file's bytes from `start` on.

        Raises:
            CorruptCheckpointError: a block on the way is not what was written.
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
        """Checks every block of the file, those that were checked before too."""
        scratch = memoryview(bytearray(min(self._entry.block_bytes, self._entry.bytes)))
        try:
            for block in range(len(self._verified)):
                start, stop = self._bounds(block)
                self._fetch(start, scratch[: stop - start])
                self._check(block, scratch[: stop - start])
        finally:
            self.close()

    def verify_mapped(self, mapped: npt.NDArray[np.uint8], touched: npt.NDArray[np.bool_]) -> None:
        """Checks the blocks marked in `touched` in a memory map of the whole file."""
        for block in np.flatnonzero(touched & ~self._verified).tolist():
            start, stop = self._bounds(block)
            self._check(block, mapped[start:stop].data)

    def close(self) -> None:
        """Closes the file; it can be read again."""
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
            raise CheckpointError(f"{self.url} could not be read: {error}") from error
        if count != len(destination):
            self._refuse(start, start + len(destination), "are missing")

    def _check(self, block: int, data: memoryview) -> None:
        if xxhash.xxh3_128_hexdigest(data) != self._entry.checksums[block]:
            self._refuse(*self._bounds(block), "are not those that were written (checksum differs)")
        self._verified[block] = True

    def _refuse(self, start: int, stop: int, fault: str) -> None:
        raise CorruptCheckpointError(
            f"{self.url}: bytes {start} to {stop} {fault}: {self._manifest.contents(self._name, start, stop)}"
        )
