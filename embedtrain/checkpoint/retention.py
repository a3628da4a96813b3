"""Which checkpoints there are, which are kept, and the sweeping up of what killed attempts left."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from embedtrain.checkpoint import storage
from embedtrain.checkpoint.agreement import on_first_rank
from embedtrain.checkpoint.manifest import MANIFEST_NAME, is_attempt_file, step_of
from embedtrain.checkpoint.reader import read_manifest
from embedtrain.errors import CheckpointError, UserError


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint: its folder and its step."""

    path: str
    step: int


def find_checkpoints(checkpoints_path: str) -> list[CheckpointInfo]:
    """Returns the complete checkpoints in a folder, oldest first; none where the folder is missing.

    Complete is one with a manifest. Whether its bytes are those that were written is seen when they are
    read: a damaged checkpoint is found here, and refused there, rather than silently passed over.
    """
    return [found for found in _step_folders(checkpoints_path) if MANIFEST_NAME in storage.list_files(found.path)]


def latest_checkpoint(checkpoints_path: str) -> str | None:
    """Returns the path of the newest complete checkpoint, or None where there is none."""
    found = find_checkpoints(checkpoints_path)
    return found[-1].path if found else None


def agree_on_latest(checkpoints_path: str, group: dist.ProcessGroup | None) -> str | None:
    """Returns what rank 0 finds to be the newest complete checkpoint, on every rank.

    Collective: every rank of `group`. Ranks that each looked for themselves could see different ones.
    """
    return on_first_rank(
        f"no checkpoint was chosen in {checkpoints_path}", lambda: latest_checkpoint(checkpoints_path), group
    )


def retain(checkpoints_path: str, keep_last: int | None, group: dist.ProcessGroup | None) -> list[str]:
    """Deletes complete checkpoints but for the newest `keep_last`; the newest is always kept.

    A manifest goes first, so that a checkpoint half deleted is one that does not exist.

    Collective: every rank of `group`.

    Args:
        checkpoints_path: folder of the run's checkpoints.
        keep_last: how many to keep; 0 or None keeps all.

    Returns:
        The paths of the deleted checkpoints.

    Raises:
        UserError: `keep_last` is negative.
        CheckpointError: a checkpoint could not be deleted.
    """
    if keep_last is not None and keep_last < 0:
        raise UserError(f"keep_last must be at least 0, got {keep_last}")

    def delete_old() -> list[str]:
        old = find_checkpoints(checkpoints_path)[:-keep_last] if keep_last else []
        for checkpoint in old:
            storage.remove(storage.join(checkpoint.path, MANIFEST_NAME))
            _remove_attempt_files(checkpoint.path, keep=frozenset())
        return [checkpoint.path for checkpoint in old]

    return on_first_rank(f"old checkpoints in {checkpoints_path} were not deleted", delete_old, group)


def sweep_leftovers(checkpoints_path: str, group: dist.ProcessGroup | None) -> list[str]:
    """Removes the files of saves that were never completed: those that no manifest lists.

    Collective: every rank of `group`. Only the job that owns the folder may call it, and not while it
    saves: an attempt under way looks like one that was killed.

    Returns:
        The paths of the removed files.

    Raises:
        CheckpointError: a file could not be removed.
    """

    def sweep() -> list[str]:
        removed = []
        for folder in _step_folders(checkpoints_path):
            try:
                removed += _remove_attempt_files(folder.path, keep=_listed_files(folder.path))
            except CheckpointError:
                # A damaged or newer manifest does not tell which files are its own: none is touched.
                continue
        return removed

    return on_first_rank(f"leftovers in {checkpoints_path} were not removed", sweep, group)


def _step_folders(checkpoints_path: str) -> list[CheckpointInfo]:
    found = []
    for name in storage.list_folders(checkpoints_path):
        step = step_of(name)
        if step is not None:
            found.append(CheckpointInfo(storage.join(checkpoints_path, name), step))
    return sorted(found, key=lambda each: each.step)


def _listed_files(path: str) -> frozenset[str]:
    """Returns the files of the complete checkpoint in a folder; none where there is no complete one."""
    if MANIFEST_NAME not in storage.list_files(path):
        return frozenset()
    return frozenset(read_manifest(path).files)


def _remove_attempt_files(path: str, keep: frozenset[str]) -> list[str]:
    """Removes the files that saving wrote to a step's folder, and the folder if nothing else is in it."""
    removed = []
    for name in sorted(storage.list_files(path)):
        if is_attempt_file(name) and name not in keep:
            storage.remove(storage.join(path, name))
            removed.append(storage.join(path, name))
    storage.remove_empty_folder(path)
    return removed
