"""Reading text files on any fsspec URL in blocks: decompressed, checked, and cut between lines or records."""

from __future__ import annotations

import itertools
import lzma
import re
import tempfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import pyarrow as pa

from embedtrain.data.readers.compression import OPENERS
from embedtrain.data.readers.quotes import Quoting, find_line_ends, find_spans
from embedtrain.data.sources import CHUNK_BYTES, Source, expand_sources, file_system_of, is_web
from embedtrain.errors import UserError

WHOLE = 1 << 62
"""The end of a segment that goes to the end of its file."""

MAX_PARTS = 256  # Each part becomes a file that is held open while it is memory-mapped.
MAX_RECORD_BYTES = 256 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
MARK_WITHIN = "the line begins with a byte-order mark, as if files had been joined: remove the mark"
_SCAN_BYTES = 1 << 16
_BARE_RETURN = re.compile(rb"\r(?!\n)")


_MARK_IN_FILE = re.compile(rb"(?:\A|[\r\n])" + BYTE_ORDER_MARK)


@dataclass(frozen=True)
class OpenSource(Source):
    """An open source that is not on a file system, such as standard input; it can be read once.

    Attributes:
        file: the open file.
    """

    file: IO[bytes] | None = None
    can_seek: bool = False


@dataclass(frozen=True)
class Segment:
    """A part of a source: the lines that begin in bytes [start, stop), or in Parquet the row groups [start, stop)."""

    source: Source
    start: int = 0
    stop: int = WHOLE


@contextmanager
def open_stored(source: Source) -> Iterator[IO[bytes]]:
    """Opens a file without decompression.

    Raises:
        UserError: it may not be read or has vanished.
    """
    if isinstance(source, OpenSource):
        assert source.file is not None
        yield source.file
        return
    fs, path = file_system_of(source.url)
    options = {"block_size": 0} if is_web(fs) and not source.can_seek else {}
    with explained(source), fs.open(path, "rb", **options) as file:
        yield file


@contextmanager
def open_seekable(source: Source) -> Iterator[IO[bytes]]:
    """Opens a file with random access; copies it to a temporary file if its storage does not allow this.

    Raises:
        UserError: it may not be read or has vanished.
    """
    with open_stored(source) as file:
        if source.can_seek:
            yield file
            return
        with tempfile.TemporaryFile() as copy:
            while block := file.read(CHUNK_BYTES):
                copy.write(block)
            copy.seek(0)
            yield copy


@contextmanager
def open_unpacked(source: Source) -> Iterator[IO[bytes]]:
    """Opens a file for sequential reading, decompressed, including all members of a compressed file.

    Raises:
        UserError: it may not be read, has vanished, or is corrupt or truncated.
    """
    with explained_codec(source), open_stored(source) as stored, _unpacked(source, stored) as file:
        yield file


@contextmanager
def explained(source: Source) -> Iterator[None]:
    """Turns errors about an unreadable or missing file into a UserError of one line that names the file."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"{source.url}: permission denied: {error}") from error
    except FileNotFoundError as error:
        raise UserError(f"{source.url}: the file has vanished since it was listed") from error


@contextmanager
def explained_codec(source: Source) -> Iterator[None]:
    """Turns errors of a codec into a UserError that names the file."""
    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error, pa.ArrowException) as error:
        # An error of a codec has no errno. An error with an errno comes from the disk or the network.
        if source.compression is None or getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{source.url} is not a valid {source.compression} file: {error}") from error


def plan_parts(sources: Iterable[Source], part_bytes: int, undivided: Collection[str] = ()) -> list[list[Segment]]:
    """Divides files into at most 256 parts of about equal size, in the order of the files.

    The parts do not depend on the number of ranks.

    Args:
        sources: the files.
        part_bytes: minimum size of a part.
        undivided: URLs of files not to divide; compressed files are never divided.
    """
    sources = list(sources)
    total_bytes = sum(source.size_bytes for source in sources)
    part_bytes = max(part_bytes, -(-total_bytes // MAX_PARTS))
    parts: list[list[Segment]] = []
    room_bytes = 0
    for source in sources:
        is_divisible = source.is_divisible and source.url not in undivided
        start = 0
        while start < source.size_bytes:
            if room_bytes <= 0:
                parts.append([])
                room_bytes = part_bytes
            stop = min(source.size_bytes, start + room_bytes) if is_divisible else source.size_bytes
            parts[-1].append(Segment(source, start, stop))
            room_bytes -= stop - start
            start = stop
    return parts


def write_first(blocks: Iterable[bytes], path: str, max_bytes: int) -> int:
    """Writes the first blocks to a local file, about `max_bytes`; returns the number of bytes."""
    written = 0
    with open(path, "wb") as file:
        for block in blocks:
            file.write(block)
            written += len(block)
            if written + len(block) // 2 >= max_bytes:  # another block as long would be further from `max_bytes`
                break
    return written


def read_chunks(
    source: Source,
    start: int,
    stop: int,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    on_read: Callable[[int], None] | None = None,
    may_be_damaged: bool = False,
) -> Iterator[bytes]:
    """Reads the lines that begin in a byte range of a text.

    Args:
        source: the file.
        start: first byte of the range; 0 for a source that is not divisible.
        stop: end of the range. The line that `stop` falls into is read to its end.
        chunk_bytes: about how much is held at a time.
        on_read: called with the number of bytes read from storage since the last call.
        may_be_damaged: whether what is not UTF-8 is passed on, for the caller to judge.

    Yields:
        UTF-8 text that ends with a line; or, in a line longer than a chunk, with a space or a tab. A bare CR ends a
        line, and is an LF here.

    Raises:
        UserError: the file is not UTF-8 text, is corrupt or truncated, has vanished or may not be read.
    """
    segment = Segment(source, start, stop)
    return _checked(
        segment, lambda blocks, _: _cut_at_words(_with_line_feeds(blocks)), chunk_bytes, on_read, not may_be_damaged
    )


def read_lines(path: str) -> list[str]:
    """Returns the lines of a small text, such as one of questions, without their ends; compressed or not.

    Raises:
        UserError: there is no such file, it is not UTF-8 text, or `path` means several files.
    """
    sources = expand_sources(path)
    if len(sources) != 1:
        raise UserError(f"{path}: expected one file, and this is {len(sources)}: name one of them")
    text = b"".join(read_records(Segment(sources[0]), None)).decode()
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []


def read_records(segment: Segment, quoting: Quoting | None, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Reads the records that begin in a part of a text; a record is a line, and goes on through quoted line breaks.

    Args:
        segment: the part; all of the file if the file is not divisible.
        quoting: None if there are no quotes; then a bare CR, which ends a line, is an LF here.
        chunk_bytes: about how much is held at a time.

    Yields:
        UTF-8 text that ends with a record.

    Raises:
        UserError: as `read_chunks`; or a quote that is opened is never closed, or a later line than the first begins
            with a byte-order mark.
    """
    source = segment.source

    def cut(blocks: Iterator[bytes], first: int) -> Iterator[bytes]:
        if quoting is None:
            return _cut_at_lines(_with_line_feeds(blocks), source)
        return _cut_at_records(blocks, first, quoting, source)

    return _checked(segment, cut, chunk_bytes, is_of_records=True)


def has_quoted_line_break(segment: Segment, quoting: Quoting) -> bool:
    """Tells whether a line ends within quotes in a part of a text; if in none does, each part begins with a record."""
    for chunk in _checked(segment, lambda blocks, _: _cut_at_lines(blocks, segment.source), CHUNK_BYTES):
        spans = find_spans(chunk, quoting)
        if len(spans.opens) and spans.are_inside(find_line_ends(chunk) - 1).any():
            return True
    return False


def line_at(source: Source, offset: int) -> int:
    """Returns the number of the line, from 1, that holds a byte of the decompressed text."""
    number = 1
    with open_unpacked(source) as file:
        for block in _with_line_feeds(_blocks(file, WHOLE, CHUNK_BYTES)):
            number += block[:offset].count(b"\n")
            offset -= len(block)
            if offset <= 0:
                break
    return number


def first_line(segment: Segment) -> int:
    """Returns the number, from 1, of the first line that begins in a part of a text."""
    if segment.start == 0:
        return 1
    return 1 + sum(chunk.count(b"\n") for chunk in read_chunks(segment.source, 0, segment.start))


def _checked(
    segment: Segment,
    cut: Callable[[Iterator[bytes], int], Iterator[bytes]],
    chunk_bytes: int,
    on_read: Callable[[int], None] | None = None,
    is_checked: bool = True,
    is_of_records: bool = False,
) -> Iterator[bytes]:
    """Reads the lines of a segment in the blocks of `cut`, checks that they are text and drops a byte-order mark."""
    source = segment.source
    with explained_codec(source), open_stored(source) as stored, _unpacked(source, stored) as file:
        at, num_bytes = 0, WHOLE
        if source.is_divisible:
            at = _line_start(file, segment.start, segment.stop)
            if segment.stop < source.size_bytes:
                num_bytes = _line_start(file, segment.stop) - at if at < segment.stop else 0
            file.seek(at)
        told = 0 if on_read is None else stored.tell()
        blocks = _blocks(file, num_bytes, max(chunk_bytes, len(BYTE_ORDER_MARK)))
        if at == 0:
            first = next(blocks, b"")
            require_utf8(first, source)
            at = len(BYTE_ORDER_MARK) if first.startswith(BYTE_ORDER_MARK) else 0
            blocks = itertools.chain([first[at:]], blocks)
        for chunk in cut(blocks, at):
            if is_checked:
                _require_text(chunk, source, at)
            if is_of_records:
                _refuse_mark(chunk, source, at)
            yield chunk
            at += len(chunk)
            if on_read is not None:
                on_read(stored.tell() - told)
                told = stored.tell()


@contextmanager
def _unpacked(source: Source, stored: IO[bytes]) -> Iterator[IO[bytes]]:
    if source.compression is None:
        yield stored
    else:
        with OPENERS[source.compression](stored) as file:
            yield file


def _line_start(file: IO[bytes], position: int, limit: int | None = None) -> int:
    """Returns the start of the first line that begins at or after `position`; may stop at `limit`."""
    if position == 0:
        return 0
    at = position - 1
    file.seek(at)
    while (limit is None or at < limit) and (block := file.read(_SCAN_BYTES)):
        if (newline := block.find(b"\n")) >= 0:
            return at + newline + 1
        at += len(block)
    return at


def _blocks(file: IO[bytes], num_bytes: int, block_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0 and (block := file.read(min(block_bytes, num_bytes))):
        num_bytes -= len(block)
        yield block


def _with_line_feeds(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Replaces each CR without a following LF by an LF."""
    held = b""
    for block in blocks:
        block, held = held + block, b""
        if b"\r" in block:
            if block.endswith(b"\r"):
                block, held = block[:-1], b"\r"
            if block.count(b"\r") != block.count(b"\r\n"):
                block = _BARE_RETURN.sub(b"\n", block)
        yield block
    if held:
        yield b"\n"


def _cut_at_words(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Cuts text after lines; cuts lines longer than a block after a space or a tab."""
    rest = b""
    for block in blocks:
        data = rest + block
        cut = data.rfind(b"\n") + 1 or max(data.rfind(b" "), data.rfind(b"\t")) + 1
        if cut:
            yield data[:cut]
        rest = data[cut:]
    if rest:
        yield rest


def _cut_at_lines(blocks: Iterable[bytes], source: Source) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in blocks:
        cut = block.rfind(b"\n") + 1
        if cut:
            yield b"".join([*rest, block[:cut]])
            rest = [block[cut:]]
        else:
            rest.append(block)
            _require_room(sum(map(len, rest)), source)
    if any(rest):
        yield b"".join(rest)


def _cut_at_records(blocks: Iterable[bytes], first: int, quoting: Quoting, source: Source) -> Iterator[bytes]:
    """Cuts text that begins at byte `first` of the file after the last line end outside quotes."""
    delimiter = quoting.delimiter.encode()
    # The beginning of an unfinished record, of which each byte is scanned once, and the text after it.
    scanned: list[bytes] = []
    is_open = False
    rest = b""
    for block in blocks:
        rest += block
        # After a line end or a delimiter it is certain whether the text is within quotes. Two characters are not
        # certain at the end of a block: a CR, which an LF may follow, and a quote, which another may follow.
        end = 1 + max(rest.rfind(b"\n"), rest.rfind(delimiter), rest.rfind(b"\r", 0, max(len(rest) - 1, 0)))
        if end:
            cut, is_open = _scan_records(rest[:end], quoting, is_open)
            if cut:
                record = b"".join([*scanned, rest[:cut]])
                scanned, first = [], first + len(record)
                yield record
            scanned.append(rest[cut:end])
            rest = rest[end:]
        if (num_bytes := sum(map(len, scanned)) + len(rest)) > MAX_RECORD_BYTES:
            _refuse_open_quote(b"".join([*scanned, rest]), first, quoting, source)
            _require_room(num_bytes, source)
    if rest := b"".join([*scanned, rest]):
        _refuse_open_quote(rest, first, quoting, source)
        yield rest


def _scan_records(text: bytes, quoting: Quoting, is_open: bool) -> tuple[int, bool]:
    """Returns the end of the last complete record of a text, or 0, and whether the text ends within quotes.

    Args:
        text: begins at the start of a field or, if `is_open`, within quotes.
    """
    quote = quoting.quote.encode()
    if quote not in text:
        return 0 if is_open else max(text.rfind(b"\n"), text.rfind(b"\r")) + 1, is_open
    spans = find_spans(quote + text if is_open else text, quoting)
    ends = find_line_ends(text)
    outside = ends[~spans.are_inside(ends - 1 + is_open)]
    return int(outside[-1]) if len(outside) else 0, spans.open_at is not None


def _refuse_open_quote(rest: bytes, first: int, quoting: Quoting, source: Source) -> None:
    open_at = find_spans(rest, quoting).open_at
    if open_at is not None:
        line = line_at(source, first + open_at)
        raise UserError(f"{source.url}:{line}: a quote opened on this line is never closed")


def _require_room(num_bytes: int, source: Source) -> None:
    if num_bytes > MAX_RECORD_BYTES:
        raise UserError(f"{source.url}: expected lines of at most {MAX_RECORD_BYTES >> 20} MiB, found a longer one")


def require_utf8(head: bytes, source: Source) -> None:
    """Raises UserError if a file begins like UTF-16."""
    if head.startswith(UTF16_MARKS):
        raise UserError(f"{source.url}: UTF-16 text: expected UTF-8; convert it, such as by: iconv -f UTF-16 -t UTF-8")


def _require_text(chunk: bytes, source: Source, offset: int) -> None:
    """Raises UserError unless a chunk is UTF-8 text; `offset` is its position in the decompressed file."""
    if (nul := chunk.find(b"\0")) >= 0:
        raise _not_text("a binary file, not text: NUL", source, offset + nul)
    if chunk.isascii():
        return
    try:
        chunk.decode()
    except UnicodeDecodeError as error:
        raise _not_text(f"not UTF-8 text: 0x{chunk[error.start]:02x}", source, offset + error.start) from error


def _refuse_mark(chunk: bytes, source: Source, offset: int) -> None:
    """Refuses a line that begins with a byte-order mark, which would become part of its first value."""
    if BYTE_ORDER_MARK in chunk and (found := _MARK_IN_FILE.search(chunk)):
        raise UserError(f"{_place_of(source, offset + found.end() - len(BYTE_ORDER_MARK))}: {MARK_WITHIN}")


def _not_text(fault: str, source: Source, place: int) -> UserError:
    inside = "" if source.compression is None else " of the decompressed text"
    return UserError(f"{_place_of(source, place)}: {fault} at byte {place}{inside}")


def _place_of(source: Source, offset: int) -> str:
    """Returns a source and the line of a byte; only the source if it cannot be read again to count lines."""
    return source.url if isinstance(source, OpenSource) else f"{source.url}:{line_at(source, offset)}"
