"""Lines of a stream, each once: standard input, a file, or a folder that files are added to."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import fsspec

from embedtrain.errors import UserError

STANDARD_INPUT = "-"

_UNFINISHED = (".partial", ".tmp")


@dataclass(frozen=True)
class StreamPosition:
    """How far a stream was read; JSON by `vars`.

    Attributes:
        name: the file being read, empty before the first; files whose names sort before it are done.
        line: lines of it that are done.
    """

    name: str = ""
    line: int = 0


class LineStream:
    """Reads a stream once, and can go on from any position.

    Files of a folder are read in order of their names, such as times, and are whole when they appear: write them
    under a name that begins with "." or ends with ".partial" or ".tmp", then rename. Standard input has no
    position of its own: to go on, give it from its beginning again, and what was read is left out.

    Args:
        path: "-" for standard input; or a file, or a folder, on any fsspec URL; compressed by its suffix.
        position: where to go on.
        poll_seconds: how often to look for new files of a folder that was read to its end; None ends there.
        standard_input: what "-" stands for, where it is not the process's own.
        pause: waits for seconds between two looks.

    Attributes:
        position: where the next line is.
    """

    def __init__(
        self,
        path: str,
        position: StreamPosition | None = None,
        *,
        poll_seconds: float | None = None,
        standard_input: BinaryIO | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.position = position or StreamPosition()
        self._path = path
        self._poll_seconds = poll_seconds
        self._standard_input = standard_input
        self._pause = pause
        self._lines = self._every_line()

    def read(self, num_lines: int) -> list[str]:
        """Returns the next lines without their ends, fewer only at the end of the stream.

        Raises:
            UserError: there is no such file, a line is not UTF-8, or a file appeared whose name sorts before the one
                being read, and which would never be read.
        """
        return list(itertools.islice(self._lines, num_lines))

    def _every_line(self) -> Iterator[str]:
        if self._path == STANDARD_INPUT:
            yield from self._lines_of(self._standard_input or sys.stdin.buffer, STANDARD_INPUT)
            return
        file_system, root = fsspec.core.url_to_fs(self._path)
        file_system.invalidate_cache()
        if file_system.isfile(root):
            names, folder = iter([root.rsplit("/", 1)[-1]]), root.rsplit("/", 1)[0]
        else:
            names, folder = self._names(file_system, root), root
        for name in names:
            try:
                with file_system.open(f"{folder}/{name}", "rb", compression="infer") as file:
                    yield from self._lines_of(file, name)
            except OSError as error:
                raise UserError(f"{self._path}/{name} cannot be read: {error}") from error

    def _names(self, file_system: fsspec.AbstractFileSystem, folder: str) -> Iterator[str]:
        """Yields the names of a folder's files from the position on, and waits for more."""
        known: set[str] | None = None
        while True:
            file_system.invalidate_cache()
            if not file_system.isdir(folder):
                raise UserError(f"there is no file or folder {self._path} to stream")
            listed = {path.rsplit("/", 1)[-1] for path in file_system.ls(folder, detail=False)}
            names = {name for name in listed if not name.startswith(".") and not name.endswith(_UNFINISHED)}
            late = sorted(name for name in names - (names if known is None else known) if name < self.position.name)
            if late:
                raise UserError(
                    f"{self._path}/{late[0]} appeared after {self.position.name} was begun: files are read once, in "
                    "order of their names; give new files names that sort after the old ones"
                )
            news = sorted(name for name in names - (known or set()) if name >= self.position.name)
            known = names
            yield from news
            if not news:
                if self._poll_seconds is None:
                    return
                self._pause(self._poll_seconds)

    def _lines_of(self, file: BinaryIO, name: str) -> Iterator[str]:
        done = self.position.line if name == self.position.name else 0
        for number, line in enumerate(file):
            if number < done:
                continue
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{self._path}: line {number + 1} of {name} is not UTF-8: {error}") from error
            self.position = StreamPosition(name, number + 1)
            yield text
