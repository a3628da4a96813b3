"""The exception classes of the package, and helpers for messages."""

from __future__ import annotations

import errno
import re

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, keep: str = "") -> str:
    """Returns a text that is safe to print to a terminal: control characters become escapes, such as \\x1b.

    Line breaks of any kind, marks that change the direction of text, and lone surrogates (bytes of paths that are not
    UTF-8) become escapes too.

    Args:
        text: a text from data, a path or a file.
        keep: characters to keep, such as line feeds between lines.
    """

    def escaped(found: re.Match[str]) -> str:
        character = found.group()
        return character if character in keep else character.encode("unicode_escape", "surrogatepass").decode()

    return _UNPRINTABLE.sub(escaped, str(text))


class UserError(ValueError):
    """The user gave a wrong argument, setting or file: the command line prints the message and exits with 2."""


class BadIdError(UserError):
    """An id is out of the range of its table; the message names feature, table, position, range and rank."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; the step was not applied on any rank."""


class JobError(RuntimeError):
    """The ranks of a job did not find one another; the message says which rank waited for what."""


class DeviceTimeoutError(RuntimeError):
    """A GPU did not come to an end in time, because another rank did not take part in a collective that it waits in."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or does not hold the requested tensors."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's bytes are damaged; the message names file, tensor and rows."""


_WRONG_PATH = {
    errno.EACCES,
    errno.EEXIST,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}


def is_wrong_path(error: OSError) -> bool:
    """Returns whether the error is about the path, which the user can change, and not about the disk (ENOSPC, EIO).

    Remote file systems raise these classes without an errno.
    """
    kinds = (PermissionError, FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return error.errno in _WRONG_PATH or isinstance(error, kinds)


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 rank", "2,000 ranks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
