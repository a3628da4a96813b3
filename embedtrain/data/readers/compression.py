"""Compression codecs: functions that read and write each of them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable
from typing import IO, Any

import pyarrow as pa

_SCAN_BYTES = 1 << 16
_XZ_PADDING_BYTES = 4


class _Members(io.RawIOBase):
    """Reads the consecutive compressed members of a file.

    If other bytes follow a member, this is an error here; `bz2.BZ2File` and `lzma.LZMAFile` silently stop.
    """

    def __init__(
        self,
        file: IO[bytes],
        new_decompressor: Callable[[], bz2.BZ2Decompressor | lzma.LZMADecompressor],
        padding_bytes: int | None = None,
    ) -> None:
        """Reads a file from its current position; a multiple of `padding_bytes` zeros may follow a member."""
        self._file = file
        self._new_decompressor = new_decompressor
        self._padding_bytes = padding_bytes
        self._decompressor = new_decompressor()
        self._stored = b""

    def readable(self) -> bool:
        """See `io.IOBase.readable`."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """See `io.RawIOBase.readinto`."""
        with memoryview(buffer).cast("B") as target:
            while True:
                if self._decompressor.eof:
                    self._stored = self._after_member()
                    if not self._stored:
                        return 0
                    self._decompressor = self._new_decompressor()
                elif self._decompressor.needs_input:
                    self._stored = self._file.read(_SCAN_BYTES)
                    if not self._stored:
                        raise EOFError("the file ends within a compressed member")
                content = self._decompressor.decompress(self._stored, len(target))
                self._stored = b""
                if content:
                    target[: len(content)] = content
                    return len(content)

    def _after_member(self) -> bytes:
        """Returns the bytes after a member and its padding; empty at the end of the file."""
        stored, num_zeros = self._decompressor.unused_data or self._file.read(_SCAN_BYTES), 0
        if self._padding_bytes is not None:
            while stored and not (rest := stored.lstrip(b"\0")):
                num_zeros += len(stored)
                stored = self._file.read(_SCAN_BYTES)
            if stored:
                num_zeros += len(stored) - len(rest)
                stored = rest
            if num_zeros % self._padding_bytes:
                raise OSError(f"{num_zeros} zeros after a member: expected a multiple of {self._padding_bytes}")
        return stored


def _open_bz2(file: IO[bytes]) -> io.BufferedReader:
    return io.BufferedReader(_Members(file, bz2.BZ2Decompressor), _SCAN_BYTES)


def _open_xz(file: IO[bytes]) -> io.BufferedReader:
    members = _Members(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), _XZ_PADDING_BYTES)
    return io.BufferedReader(members, _SCAN_BYTES)


OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    "gzip": lambda file: gzip.GzipFile(fileobj=file),
    "bz2": _open_bz2,
    "xz": _open_xz,
    "zstd": lambda file: pa.input_stream(file, compression="zstd"),
}
"""Per codec, a function that returns the decompressed content of an open file."""

PACKERS: dict[str, Callable[[IO[bytes]], Any]] = {
    # Without a timestamp, equal content makes equal files.
    "gzip": lambda file: gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0),
    "bz2": lambda file: bz2.BZ2File(file, "wb"),
    "xz": lambda file: lzma.LZMAFile(file, "wb"),  # noqa: SIM115, the caller closes it
    "zstd": lambda file: pa.CompressedOutputStream(pa.PythonFile(file, "w"), "zstd"),
}
"""By the name of a codec, a function that returns a file whose content it writes compressed to an open one."""
