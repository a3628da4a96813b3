"""Reading the records of a stream exactly once: standard input, a file, or a folder to which files are added."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import xxhash
from fsspec import AbstractFileSystem

from embedtrain.data.readers.blocks import BYTE_ORDER_MARK, MARK_WITHIN, MAX_RECORD_BYTES, UTF16_MARKS, open_unpacked
from embedtrain.data.readers.quotes import Quoting, find_line_ends, find_spans, open_test
from embedtrain.data.sources import file_system_of, is_hidden, source_at
from embedtrain.errors import UserError
from embedtrain.schema import Count

STANDARD_INPUT = "-"

MAX_OPEN_BYTES = 1 << 20
"""Maximum bytes of a record with an open quote. Without a limit, a stray quote would swallow the rest of the stream."""

_UNFINISHED = (".partial", ".tmp")
_TURN_SECONDS = 1.0
"""Poll timeout of the non-blocking reader, in seconds."""
_READ_BYTES = 1 << 16
_ODD = (b"\r", b"\0", BYTE_ORDER_MARK)
"""Lines without these are records without further checks."""
_NEVER_CLOSED = "a quote opened on this line is never closed"


@dataclass(frozen=True)
class StreamPosition:
    """Says how far a stream was read; JSON by `vars`.

    Attributes:
        name: the file being read, empty before the first; files that sort before it are done.
        line: number of its lines that are done.
        digest: hash of these lines, to recognise them after a restart.
    """

    name: str = ""
    line: Count = 0
    digest: str = ""


@dataclass(frozen=True)
class Lines:
    """Holds records of a stream: single lines, or several lines with quoted line breaks.

    Attributes:
        texts: the records without line ends.
        numbers: their positions: a file, a line number from 1, and the number of records that begin on that line and
            the following ones.
        wrong: reasons of bad records by their index in `texts`, where their text is empty.
    """

    texts: list[str]
    numbers: list[tuple[str, int, int]]
    wrong: dict[int, str] = field(default_factory=dict)

    def count(self, name: str, first: int, num_lines: int) -> None:
        """Records the positions of the lines just added."""
        if self.numbers:
            last_name, last_first, last_count = self.numbers[-1]
            if last_first + last_count == first and last_name == name:
                self.numbers[-1] = (name, last_first, last_count + num_lines)
                return
        self.numbers.append((name, first, num_lines))

    def place(self, index: int) -> str:
        """Returns the file and the line number (from 1) of a text, for messages."""
        for name, first, count in self.numbers:
            if index < count:
                return f"{'standard input' if name == STANDARD_INPUT else name}:{first + index}"
            index -= count
        raise IndexError(f"the index must be less than the {len(self.texts)} lines")


class LineStream:
    """Reads a stream once, record by record, from any position.

    Files of a folder are read in the order of their names, and must be complete when they appear: write them under a
    name that begins with "." or "_" or ends with ".partial" or ".tmp", then rename them. A file may be removed once a
    later file is being read. To continue with standard input, send it from its beginning; the lines already read are
    skipped, and a hash checks that they are the same.

    Args:
        path: "-" for standard input; or a file or a folder on any fsspec URL. Compressed files are decompressed.
        position: where to continue.
        poll_seconds: seconds between two looks for new files in the folder; None ends after the last file.
        quoting: the characters that quote line breaks; None for none.
        standard_input: file descriptor of standard input.
        pause: function that waits a number of seconds.

    Attributes:
        position: position of the next line.
    """

    def __init__(
        self,
        path: str,
        position: StreamPosition | None = None,
        *,
        poll_seconds: float | None = None,
        quoting: Quoting | None = None,
        standard_input: int = 0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.position = position or StreamPosition()
        self._path = path
        self._poll_seconds = poll_seconds
        self._quoting = quoting
        self._standard_input = standard_input
        self._pause = pause
        self._name, self._line, self._digest = self.position.name, self.position.line, xxhash.xxh3_64()
        self._first_line = self._line
        self._lines = self._every_line()
        self._run: _Run | None = None
        self._taken = Lines([], [])

    def read(self, num_lines: int) -> list[str]:
        """Returns the next lines without their ends, fewer only at the end of the stream.

        Raises:
            UserError: the file does not exist, a line is bad or not UTF-8, lines read before are missing or changed, or
                a file appeared that sorts before the file being read, so that it would never be read.
        """
        while (lines := self.take(num_lines)) is None:
            pass
        for index, reason in lines.wrong.items():
            raise UserError(f"{lines.place(index)}: {reason}")
        return lines.texts

    def take(self, num_lines: int) -> Lines | None:
        """Returns lines like `read`, including bad ones; None if they have not all arrived within a second.

        Lines that have arrived are kept for the next call.
        """
        taken = self._taken
        while (num_missing := num_lines - len(taken.texts)) > 0:
            if self._run is not None:
                self._take_of_run(self._run, num_missing, taken)
                continue
            try:
                line = next(self._lines)
            except StopIteration:
                break
            if line is None:
                return None
            if isinstance(line, _Run):
                self._run = line
                continue
            if isinstance(line, _Wrong):
                taken.wrong[len(taken.texts)] = line.reason
                line = ""
            taken.texts.append(line)
            taken.count(self._name, self._first_line, 1)
        self._taken = Lines([], [])
        if taken.texts:
            self.position = StreamPosition(self._name, self._line, self._digest.hexdigest())
        return taken

    def _take_of_run(self, run: _Run, num_lines: int, taken: Lines) -> None:
        """Takes the next lines of a run and advances the position."""
        texts = run.texts[run.num_taken : run.num_taken + num_lines]
        self._name, self._digest = run.name, run.digest
        is_whole = len(texts) == len(run.texts)
        self._digest.update(run.content if is_whole else "".join(map("{}\n".format, texts)).encode())
        first = run.first + run.num_taken
        taken.texts.extend(texts)
        taken.count(run.name, first, len(texts))
        run.num_taken += len(texts)
        self._first_line, self._line = first + len(texts) - 1, first + len(texts) - 1
        if run.num_taken == len(run.texts):
            self._run = None

    def _every_line(self) -> Iterator[str | _Wrong | _Run | None]:
        """Yields the records from the position on, plain lines in runs; yields None on each poll timeout."""
        if self._path == STANDARD_INPUT:
            yield from self._records_of(
                _split(_read_descriptor(self._standard_input), self._path_of(STANDARD_INPUT)), STANDARD_INPUT
            )
            return
        file_system, root = file_system_of(self._path)
        file_system.invalidate_cache()
        if file_system.isfile(root):
            folder, _, only = root.rpartition("/")
            names: Iterator[str | None] = iter([only])
        else:
            names, folder = self._names(file_system, root), root
        for name in names:
            if name is None:
                yield None
                continue
            try:
                with open_unpacked(source_at(file_system, f"{folder}/{name}", self._path)) as file:
                    yield from self._records_of(
                        _split(iter(lambda: file.read(_READ_BYTES), b""), self._path_of(name)), name
                    )
            except OSError as error:
                raise UserError(f"cannot read {self._path_of(name)}: {error}") from error

    def _names(self, file_system: AbstractFileSystem, folder: str) -> Iterator[str | None]:
        """Yields the names of a folder's files from the position on; yields None while it waits for more."""
        known: set[str] | None = None
        while True:
            file_system.invalidate_cache()
            if not file_system.isdir(folder):
                raise UserError(f"there is no file or folder {self._path} to stream")
            listed = {path.rsplit("/", 1)[-1] for path in file_system.ls(folder, detail=False)}
            names = {name for name in listed if not is_hidden(name) and not name.endswith(_UNFINISHED)}
            if known is None and self._name and self._name not in names:
                raise UserError(
                    f"{self._path}/{self._name} is gone, of which {self._line} lines were read: bring it back; a file "
                    "may be removed when a later one was begun"
                )
            late = sorted(name for name in names - (names if known is None else known) if name < self._name)
            if late:
                raise UserError(
                    f"{self._path}/{late[0]} appeared after {self._name} was begun: files are read once, in "
                    "order of their names; give new files names that sort after the old ones"
                )
            news = sorted(name for name in names - (known or set()) if name >= self._name)
            known = names
            yield from news
            if not news:
                if self._poll_seconds is None:
                    return
                yield from self._wait(self._poll_seconds)

    def _wait(self, seconds: float) -> Iterator[None]:
        while seconds > 0:
            self._pause(min(seconds, _TURN_SECONDS))
            seconds -= _TURN_SECONDS
            yield None

    def _path_of(self, name: str) -> str:
        if name == STANDARD_INPUT:
            return "standard input"
        return self._path if self._path.endswith(f"/{name}") else f"{self._path}/{name}"

    def _records_of(self, blocks: Iterable[list[bytes] | None], name: str) -> Iterator[str | _Wrong | _Run | None]:
        """Yields the unread records of a file; yields None on each poll timeout."""
        before = self.position if name == self.position.name else StreamPosition()
        where = self._path_of(name)
        digest = xxhash.xxh3_64()
        records = _Records(self._quoting, before.line + 1)
        number = 0
        for lines in blocks:
            if lines is None:
                yield None
                continue
            if number >= max(1, before.line) and (run := records.run_of(lines, name, digest)) is not None:
                number += len(lines)
                yield run
                continue
            for line in lines:
                number += 1
                if number == 1:
                    line = _without_mark(line, where)
                if number > before.line:
                    for record in records.add(line):
                        yield self._taken_up(record, name, digest)
                    continue
                digest.update(line.rstrip(b"\r\n") + b"\n")
                if number == before.line and before.digest not in ("", digest.hexdigest()):
                    raise UserError(
                        f"the first {number} lines of {where} differ from the lines read before: send it again from "
                        "its beginning, unchanged, or start a new run"
                    )
        for record in records.end():
            yield self._taken_up(record, name, digest)
        if number < before.line:
            raise UserError(
                f"{where} ends after {number} lines, but {before.line} were read before: send it again from its "
                "beginning"
            )

    def _taken_up(self, record: _Record, name: str, digest: xxhash.xxh3_64) -> str | _Wrong:
        """Advances past a record; returns its text without the line end, or the reason why it is bad."""
        for line in record.lines:
            digest.update(line.rstrip(b"\r\n") + b"\n")
        self._name, self._line, self._digest = name, record.first + len(record.lines) - 1, digest
        self._first_line = record.first
        if record.reason:
            return _Wrong(record.reason)
        where = self._path_of(name)
        try:
            text = b"".join(record.lines).rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            raise UserError(f"line {record.first} of {where} is not UTF-8: {error}") from error
        if "\0" in text:
            raise UserError(f"line {record.first} of {where} is not text: it holds NUL")
        if any(line.startswith(BYTE_ORDER_MARK) for line in record.lines):
            raise UserError(f"line {record.first} of {where}: {MARK_WITHIN}")
        return text


@dataclass
class _Run:
    """Holds consecutive lines of a file, each of which is a record.

    Attributes:
        texts: the lines without line ends.
        content: their bytes, each line with an LF.
        name: name of the file.
        first: number of the first line.
        digest: hash of the file's lines before these; updated as lines are taken.
        num_taken: number of lines taken.
    """

    texts: list[str]
    content: bytes
    name: str
    first: int
    digest: xxhash.xxh3_64
    num_taken: int = 0


class _Wrong(NamedTuple):
    """Stands for a bad record."""

    reason: str


class _Record(NamedTuple):
    """Holds the lines of a record with their ends and the number of the first line; `reason` is set if it is bad."""

    lines: list[bytes]
    first: int
    reason: str = ""


class _Records:
    """Joins lines with quoted line breaks into records; scans each line once.

    If a quote is still open after `MAX_OPEN_BYTES` or at the end, the line that opens it is bad, and the following
    lines are records of their own.
    """

    def __init__(self, quoting: Quoting | None, first: int) -> None:
        self._quote = None if quoting is None else quoting.quote.encode()
        self._is_open_after = None if quoting is None else open_test(quoting)
        self._quoting = quoting
        self._first = first
        self._open: list[bytes] = []
        self._num_bytes = 0

    def run_of(self, lines: list[bytes], name: str, digest: xxhash.xxh3_64) -> _Run | None:
        """Takes the next lines if each of them is a record; returns None if they must be scanned one by one.

        The condition is that no earlier line is open, no line ends within quotes, and they contain no CR and no fault.
        """
        content = b"".join(lines)
        if self._open or not content.endswith(b"\n") or any(each in content for each in _ODD):
            return None
        if self._quoting is not None and self._quoting.quote.encode() in content:
            spans = find_spans(content, self._quoting)
            if spans.open_at is not None or spans.are_inside(find_line_ends(content) - 1).any():
                return None
        try:
            texts = content.decode().split("\n")
        except UnicodeDecodeError:
            return None
        texts.pop()
        run = _Run(texts, content, name, self._first, digest)
        self._first += len(lines)
        return run

    def add(self, line: bytes) -> list[_Record]:
        """Takes the next line; returns the records that end with it."""
        if not self._open and (self._quote is None or self._quote not in line):
            return [self._record([line])]
        return self._scan(deque([line]), MAX_OPEN_BYTES, f" within {MAX_OPEN_BYTES >> 20} MiB")

    def end(self) -> list[_Record]:
        """Returns the remaining records after the last line."""
        found: list[_Record] = []
        while self._open:
            found.append(self._record([self._open[0]], _NEVER_CLOSED))
            others, self._open, self._num_bytes = deque(self._open[1:]), [], 0
            found += self._scan(others, MAX_RECORD_BYTES, "")
        return found

    def _scan(self, lines: deque[bytes], max_bytes: int, within: str) -> list[_Record]:
        assert self._is_open_after is not None
        found = []
        while lines:
            line = lines.popleft()
            is_open = self._is_open_after(line, bool(self._open))
            self._open.append(line)
            self._num_bytes += len(line)
            if is_open and self._num_bytes <= max_bytes:
                continue
            if is_open:
                found.append(self._record([self._open[0]], _NEVER_CLOSED + within))
                lines.extendleft(reversed(self._open[1:]))
            else:
                found.append(self._record(self._open))
            self._open, self._num_bytes = [], 0
        return found

    def _record(self, lines: list[bytes], reason: str = "") -> _Record:
        record = _Record(lines, self._first, reason)
        self._first += len(lines)
        return record


def _split(blocks: Iterable[bytes | None], where: str) -> Iterator[list[bytes] | None]:
    """Yields the lines of each block with their ends (LF, CRLF or a bare CR), and each None.

    Raises:
        UserError: a line is too long.
    """
    # The beginning of an unfinished line. A CR at the end stays here, because an LF may follow it.
    rest: list[bytes] = []
    num_bytes = 0
    for block in blocks:
        if block is None:
            yield None
            continue
        lines = block.splitlines(keepends=True)
        if rest and rest[-1].endswith(b"\r") and not block.startswith(b"\n"):
            lines.insert(0, b"".join(rest))
            rest = []
        if len(lines) == 1 and not block.endswith(b"\n"):
            rest.append(block)
            num_bytes += len(block)
            if num_bytes > MAX_RECORD_BYTES:
                raise UserError(f"{where}: expected lines of at most {MAX_RECORD_BYTES >> 20} MiB, found a longer one")
            continue
        lines[0] = b"".join([*rest, lines[0]])
        rest = [] if lines[-1].endswith(b"\n") else [lines.pop()]
        num_bytes = sum(map(len, rest))
        yield lines
    if rest:
        yield [b"".join(rest)]


def _without_mark(line: bytes, where: str) -> bytes:
    if line.startswith(UTF16_MARKS):
        raise UserError(f"{where}: UTF-16 text: expected UTF-8")
    return line.removeprefix(BYTE_ORDER_MARK)


def _read_descriptor(descriptor: int) -> Iterator[bytes | None]:
    """Yields blocks from a file descriptor; yields None on each poll timeout."""
    while True:
        if not select.select([descriptor], [], [], _TURN_SECONDS)[0]:
            yield None
            continue
        data = os.read(descriptor, _READ_BYTES)
        if not data:
            return
        yield data
