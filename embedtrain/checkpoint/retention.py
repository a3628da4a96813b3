"""Which checkpoints there are, which are kept, and the sweeping up of what killed attempts left."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from embedtrain import storage
from embedtrain.checkpoint.agreement import on_first_rank
from embedtrain.checkpoint.chain import read_manifest
from embedtrain.checkpoint.manifest import MANIFEST_NAME, Manifest, is_attempt_file, step_of
from embedtrain.checkpoint.reader import verify
from embedtrain.distributed.ranks import Ranks
from embedtrain.errors import CheckpointError, CorruptCheckpointError, UserError


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


def latest_checkpoint(checkpoints_path: str, before: str | None = None) -> str | None:
    """Returns the path of the newest complete checkpoint, or None where there is none.

    Args:
        checkpoints_path: folder of the run's checkpoints.
        before: path of a checkpoint; only those of earlier steps are looked at.
    """
    found = find_checkpoints(checkpoints_path)
    if before is not None:
        found = [checkpoint for checkpoint in found if checkpoint.step < (step_of(storage.base_name(before)) or 0)]
    return found[-1].path if found else None


def newest_whole(checkpoints_path: str, before: str) -> str | None:
    """Returns the path of the newest checkpoint before another that verifies, or None; reads whole checkpoints."""
    known: set[str] = set()
    path: str | None = before
    while (path := latest_checkpoint(checkpoints_path, before=path)) is not None:
        try:
            verify(path, known)
        except CorruptCheckpointError:
            continue
        return path
    return None


def agree_on_latest(checkpoints_path: str, ranks: Ranks, *, before: str | None = None) -> str | None:
    """Returns what rank 0 finds by `latest_checkpoint`, on every rank.

    Collective: every rank. Ranks that each looked for themselves could see different ones.
    """
    return on_first_rank(
        f"no checkpoint was chosen in {checkpoints_path}", lambda: latest_checkpoint(checkpoints_path, before), ranks
    )


_SMALLEST = re.compile(r"(.*_)?(loss|entropy)")
_LARGEST = re.compile(
    r"(.*_)?(auc|recall|ndcg|hit|hits|hit_rate|mrr|map|precision|similarity|accuracy|coverage)(@\d+)?"
)


def mode_of_best(metric: str, mode: Literal["auto", "min", "max"]) -> Literal["min", "max"]:
    """Returns whether the smallest or the largest values of a metric are the best.

    Args:
        metric: its name.
        mode: what the configuration says; "auto" goes by the name.

    Raises:
        UserError: the mode is "auto", and the name is none of embedtrain's measures.
    """
    if mode != "auto":
        return mode
    if _SMALLEST.fullmatch(metric):
        return "min"
    if _LARGEST.fullmatch(metric):
        return "max"
    raise UserError(
        f"are the smallest or the largest values of checkpoint.best_metric={metric} the best? Give "
        "checkpoint.best_mode=min or checkpoint.best_mode=max"
    )


def num_best(keep_best: int | None, patience: int | None) -> int | None:
    """Returns how many of the best checkpoints a run keeps; a run that may stop early keeps one unless told otherwise.

    Args:
        keep_best: `checkpoint.keep_best`.
        patience: `train.early_stop.patience`.
    """
    return 1 if keep_best is None and patience is not None else keep_best


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay: those that any of these keeps. Where all are None, all stay.

    Attributes:
        keep_last: so many of the newest.
        keep_every: those whose step is a multiple of this.
        keep_best: so many of the best by a metric.
        best_metric: the metric: a name among `state["metrics"]` of a checkpoint.
        best_mode: whether the smallest or the largest values are the best; see `mode_of_best`.

    Raises:
        UserError: a number is less than 1, or nobody knows which values of the metric are the best.
    """

    keep_last: int | None = None
    keep_every: int | None = None
    keep_best: int | None = None
    best_metric: str = "loss"
    best_mode: Literal["auto", "min", "max"] = "auto"

    def __post_init__(self) -> None:
        mode_of_best(self.best_metric, self.best_mode)
        for name in ("keep_last", "keep_every", "keep_best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, or none to leave it out, got {value}")


def retain(checkpoints_path: str, retention: Retention, ranks: Ranks) -> list[str]:
    """Deletes complete checkpoints that nothing keeps.

    The newest whose files are all there, each as long as it was written, is always kept, and so are the
    checkpoints that a kept delta holds changes to. A manifest goes first, so that a checkpoint half deleted is
    one that does not exist.

    Collective: every rank.

    Returns:
        The paths of the deleted checkpoints.

    Raises:
        CheckpointError: a checkpoint could not be deleted or looked at.
    """

    def delete_old() -> list[str]:
        found = find_checkpoints(checkpoints_path)
        kept = _kept(found, retention)
        # Newest first: a delta goes before what it holds changes to.
        old = [checkpoint for checkpoint in reversed(found) if checkpoint.step not in kept]
        for checkpoint in old:
            remove_checkpoint(checkpoint.path)
        return [checkpoint.path for checkpoint in reversed(old)]

    return on_first_rank(f"old checkpoints in {checkpoints_path} were not deleted", delete_old, ranks)


def remove_checkpoint(path: str) -> None:
    """Deletes a checkpoint, its manifest first."""
    storage.remove(storage.join(path, MANIFEST_NAME))
    _remove_attempt_files(path, keep=frozenset())


def _kept(found: list[CheckpointInfo], retention: Retention) -> set[int]:
    """Returns the steps that stay."""
    if (retention.keep_last, retention.keep_every, retention.keep_best) == (None, None, None):
        return {checkpoint.step for checkpoint in found}
    sound = _sound_manifests(found)
    if not sound:
        return {checkpoint.step for checkpoint in found}
    steps = sorted(sound)
    # What is newer than the newest sound one is damaged: left for its owner to look at, and not counted.
    kept = {checkpoint.step for checkpoint in found if checkpoint.step > steps[-1]}
    kept.update(steps[-(retention.keep_last or 1) :])
    if retention.keep_every:
        kept.update(step for step in steps if step % retention.keep_every == 0)
    if retention.keep_best:
        mode = mode_of_best(retention.best_metric, retention.best_mode)
        values = [
            (value if mode == "min" else -value, step)
            for step, manifest in sound.items()
            if (value := manifest.state.get("metrics", {}).get(retention.best_metric)) is not None
        ]
        kept.update(step for _, step in sorted(values)[: retention.keep_best])
    for step in reversed(steps):
        parent = sound[step].parent
        if step in kept and parent is not None:
            kept.add(parent.step)
    return kept


def _sound_manifests(found: list[CheckpointInfo]) -> dict[int, Manifest]:
    """Returns the manifests of checkpoints whose files, and those of what they change, are all as long as written."""
    sound: dict[int, Manifest] = {}
    for checkpoint in found:
        try:
            manifest = read_manifest(checkpoint.path)
        except CorruptCheckpointError:
            continue
        sizes = storage.list_files(checkpoint.path)
        is_whole = all(sizes.get(name) == entry.bytes for name, entry in manifest.files.items())
        parent = manifest.parent
        has_parent = parent is None or (parent.step in sound and sound[parent.step].checksum == parent.checksum)
        if is_whole and has_parent:
            sound[checkpoint.step] = manifest
    return sound


def sweep_leftovers(checkpoints_path: str, ranks: Ranks) -> list[str]:
    """Removes the files of saves that were never completed: those that no manifest lists.

    Collective: every rank. Only the job that owns the folder may call it, and not while it
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

    return on_first_rank(f"leftovers in {checkpoints_path} were not removed", sweep, ranks)


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
