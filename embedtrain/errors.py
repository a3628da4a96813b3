"""The errors that a caller can catch, and texts as they are shown to a user."""

from __future__ import annotations

import errno
import re

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object, keep: str = "") -> str:
    """Returns a text in which a terminal finds no commands: control characters are written as escapes, such as \\x1b.

    So are line breaks of any kind, marks that turn the direction of text, and halves of surrogate pairs, which stand
    for bytes of paths that are no text.

    Args:
        text: any text that came from data, a path or a file.
        keep: characters that are left as they are, such as line feeds between lines.
    """

    def escaped(found: re.Match[str]) -> str:
        character = found.group()
        return character if character in keep else character.encode("unicode_escape", "surrogatepass").decode()

    return _UNPRINTABLE.sub(escaped, str(text))


class UserError(ValueError):
    """Something the user gave is wrong: the command line prints its message alone and exits with 2."""


class BadIdError(UserError):
    """An id is negative or past its table; the message names feature, table, position, range and rank."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; nothing of the step was applied on any rank."""


class JobError(RuntimeError):
    """The ranks of a job did not come together; the message says which rank waited for what."""


class DeviceTimeoutError(RuntimeError):
    """A GPU did not come to an end in time, because another rank did not take part in a collective that it waits in."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not hold what was asked of it."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's bytes are not those that were written; the message names file, tensor and rows."""


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
    """Tells whether the path cannot be used, which the user can mend; other errors, as ENOSPC and EIO, blame the disk.

    Remote file systems raise the classes without a number.
    """
    kinds = (PermissionError, FileExistsError, FileNotFoundError, NotADirectoryError, IsADirectoryError)
    return error.errno in _WRONG_PATH or isinstance(error, kinds)


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 rank", "2,000 ranks"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
