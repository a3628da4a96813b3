"""The errors that a caller can catch."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user gave is wrong: the command line prints its message alone and exits with 2."""


class BadIdError(UserError):
    """An id is negative or past its table; the message names feature, table, position, range and rank."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; nothing of the step was applied on any rank."""


class JobError(RuntimeError):
    """The ranks of a job did not come together; the message says which rank waited for what."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or does not hold what was asked of it."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's bytes are not those that were written; the message names file, tensor and rows."""
