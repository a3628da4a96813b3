"""Text files on any fsspec URL: which ones a path means, and their lines, a few MiB at a time."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import pyarrow as pa
import xxhash
from fsspec.implementations.local import LocalFileSystem

from embedtrain.errors import UserError

CHUNK_BYTES = 4 << 20
TEXT_SUFFIXES = (".txt", ".gz", ".zst", ".bz2")
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SCAN_BYTES = 1 << 16
# What file systems call the facts that change when a file's content does.
_TIME_KEYS = frozenset({"mtime", "modified", "lastmodified", "last_modified", "last-modified"})
_HASH_KEYS = frozenset({"etag", "checksum", "md5", "md5hash", "content-md5", "sha"})


@dataclass(frozen=True)
class Source:
    """One file of text.

    Attributes:
        url: any fsspec URL; an absolute path for a local file.
        size_bytes: as stored, before decompression.
        identity: changes when the file does: its URL, its size, and what its file system tells about the
            version of its content (or a hash of the content, where that is nothing).
    """

    url: str
    size_bytes: int
    identity: str

    @property
    def compression(self) -> str | None:
        """The codec that the name's suffix stands for; None for a plain file."""
        return _CODECS.get(os.path.splitext(self.url)[1])


def expand_sources(path: str | Sequence[str], suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Source]:
    """Lists the files that a path means.

    Args:
        path: one or several of: a file, a glob (`*.txt`, `folder/**/*.txt.gz`), or a folder, which stands
            for the files in it and below it whose names end in one of `suffixes`. Any fsspec URL.
        suffixes: endings of the names that are taken from a folder.

    Returns:
        The files in the order of the paths, sorted within each; a file that several match comes once.

    Raises:
        UserError: a path does not exist, matches nothing, may not be read, or has an unknown protocol.
    """
    paths = [path] if isinstance(path, str) else list(path)
    if not paths:
        raise UserError("no path was given: expected a file, a glob or a folder")
    found: dict[str, Source] = {}
    for one in paths:
        for source in _expand(one, suffixes):
            found.setdefault(source.url, source)
    return list(found.values())


def refuse_changes(path: str | Sequence[str], suffixes: tuple[str, ...], identities: Collection[str]) -> None:
    """Makes sure that the files that a path means are still those that data were prepared from.

    Args:
        path, suffixes: as in `expand_sources`.
        identities: of the files then; see `Source.identity`.

    Raises:
        UserError: a file has changed, come or gone.
    """
    changed = {source.identity for source in expand_sources(path, suffixes)} ^ set(identities)
    if changed:
        names = sorted({identity.partition(" size=")[0] for identity in changed})
        raise UserError(
            f"{', '.join(names)}: changed while the run trained on it. The run can be resumed where the examples are "
            "still the same; else bring the file back, or start a new run.path"
        )


def read_chunks(
    source: Source,
    start: int,
    stop: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    on_read: Callable[[int], None] | None = None,
) -> Iterator[bytes]:
    """Reads the lines that begin in a byte range of a source.

    Args:
        start: first byte of the range; 0 for a compressed source, which can be read only as a whole.
        stop: end of the range. The line that `stop` falls into is read to its end.
        chunk_bytes: about how much is held at a time.
        on_read: called with the number of bytes read from storage since the last call.

    Yields:
        UTF-8 text that ends with a line; or, in a line longer than a chunk, with a space or a tab.

    Raises:
        UserError: the file is not UTF-8 text, is corrupt or truncated, has vanished or may not be read.
    """
    with _explained_codec(source), _open(source.url) as file:
        if source.compression is None:
            first = _line_start(file, start, stop)
            end = stop if stop >= source.size_bytes or first >= stop else _line_start(file, stop)
            file.seek(first)
            blocks = _range_blocks(file, max(0, end - first), chunk_bytes)
        else:
            first = 0
            # Held in a variable, for its end of life closes `file`.
            stream = pa.input_stream(file, compression=source.compression)
            blocks = _stream_blocks(stream, chunk_bytes)
        told = file.tell()
        for chunk in _cut_at_lines(blocks):
            _require_text(chunk, source, first)
            yield chunk.removeprefix(_BYTE_ORDER_MARK) if first == 0 else chunk
            first += len(chunk)
            if on_read is not None:
                on_read(file.tell() - told)
                told = file.tell()


def _expand(path: str, suffixes: tuple[str, ...]) -> list[Source]:
    try:
        fs, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{path}: {error}") from error
    try:
        info = _info_or_none(fs, root)
        if info is not None and info["type"] == "file":
            return [_source(fs, info)]
        if info is not None:
            infos = fs.find(root, detail=True).values()
            chosen = [i for i in infos if i["type"] == "file" and i["name"].endswith(suffixes)]
            if not chosen:
                expected = ", ".join(f"*{suffix}" for suffix in suffixes)
                held = _contents(fs, root)
                raise UserError(f"{path}: no file ({expected}) in this folder or below it; {held}")
        elif fsspec.core.has_magic(root):
            chosen = [i for i in fs.glob(root, detail=True).values() if i["type"] == "file"]
            if not chosen:
                raise UserError(f"{path}: no file matches; {_surroundings(fs, root)}")
        else:
            raise UserError(f"{path}: no such file or folder; {_surroundings(fs, root)}")
        return sorted((_source(fs, i) for i in chosen), key=lambda source: source.url)
    except PermissionError as error:
        raise UserError(f"{path}: permission denied: {error}") from error


def _info_or_none(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any] | None:
    try:
        return dict(fs.info(path))
    except (FileNotFoundError, NotADirectoryError):
        return None


def _source(fs: fsspec.AbstractFileSystem, info: dict[str, Any]) -> Source:
    path = info["name"]
    url = path if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(path)
    told = {key.lower(): str(value) for key, value in info.items() if value is not None}
    version = {key: value for key, value in told.items() if key in _TIME_KEYS | _HASH_KEYS}
    size = info["size"]
    if size is None or not version:
        size, version = _hashed(fs, path)
    return Source(url, size, f"{url} size={size} {sorted(version.items())}")


def _hashed(fs: fsspec.AbstractFileSystem, path: str) -> tuple[int, dict[str, str]]:
    digest, size = xxhash.xxh3_128(), 0
    with fs.open(path, "rb") as file:
        while block := file.read(CHUNK_BYTES):
            digest.update(block)
            size += len(block)
    return size, {"xxh3": digest.hexdigest()}


def _surroundings(fs: fsspec.AbstractFileSystem, path: str) -> str:
    """Says which names the user may have meant: those in the nearest folder that exists."""
    name = os.path.basename(path)
    parent = os.path.dirname(path)
    while (info := _info_or_none(fs, parent)) is None or info["type"] != "directory":
        if parent == os.path.dirname(parent):
            return "nothing exists at the start of this path"
        name, parent = os.path.basename(parent), os.path.dirname(parent)
    close = difflib.get_close_matches(name, _names(fs, parent), n=3)
    if close:
        return f"did you mean {' or '.join(os.path.join(parent, match) for match in close)}?"
    return _contents(fs, parent)


def _contents(fs: fsspec.AbstractFileSystem, folder: str) -> str:
    names = _names(fs, folder)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{folder} holds {shown}" if names else f"{folder} is empty"


def _names(fs: fsspec.AbstractFileSystem, folder: str) -> list[str]:
    return sorted(os.path.basename(path.rstrip("/")) for path in fs.ls(folder, detail=False))


def _open(url: str) -> IO[bytes]:
    fs, path = fsspec.core.url_to_fs(url)
    file: IO[bytes] = fs.open(path, "rb")
    return file


@contextmanager
def explained(source: Source) -> Iterator[None]:
    """Turns a file that may not be read, or is gone, into one line that names it: the user's to mend."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{source.url}: permission denied: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{source.url}: the file has vanished since it was listed") from error


@contextmanager
def _explained_codec(source: Source) -> Iterator[None]:
    """As `explained`, for a codec's complaints too."""
    try:
        with explained(source):
            yield
    except (OSError, pa.ArrowException) as error:
        # A codec's complaint has no errno; a failing disk or network has one, and is not the file's fault.
        if source.compression is None or getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{source.url}: cannot be read as {source.compression}: {error}") from error


def _line_start(file: IO[bytes], position: int, limit: int | None = None) -> int:
    """Finds where the first line that begins at or after `position` begins; may stop at `limit`."""
    if position == 0:
        return 0
    at = position - 1
    file.seek(at)
    while (limit is None or at < limit) and (block := file.read(_SCAN_BYTES)):
        if (newline := block.find(b"\n")) >= 0:
            return at + newline + 1
        at += len(block)
    return at


def _range_blocks(file: IO[bytes], num_bytes: int, chunk_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0 and (block := file.read(min(chunk_bytes, num_bytes))):
        num_bytes -= len(block)
        yield block


def _stream_blocks(stream: pa.NativeFile, chunk_bytes: int) -> Iterator[bytes]:
    while block := stream.read(chunk_bytes):
        yield block


def _cut_at_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    rest = b""
    for block in blocks:
        data = rest + block
        cut = data.rfind(b"\n") + 1 or max(data.rfind(b" "), data.rfind(b"\t")) + 1
        if cut:
            yield data[:cut]
        rest = data[cut:]
    if rest:
        yield rest


def _require_text(chunk: bytes, source: Source, offset: int) -> None:
    """Refuses what is not UTF-8 text; `offset` is the chunk's place in the (decompressed) file."""
    inside = "" if source.compression is None else " of the decompressed text"
    if (nul := chunk.find(b"\0")) >= 0:
        raise UserError(f"{source.url}: a binary file, not text: NUL at byte {offset + nul}{inside}")
    try:
        chunk.decode()
    except UnicodeDecodeError as error:
        value, place = chunk[error.start], offset + error.start
        raise UserError(f"{source.url}: not UTF-8 text: 0x{value:02x} at byte {place}{inside}") from error
