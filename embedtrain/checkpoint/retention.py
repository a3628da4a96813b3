"""Finding a run's checkpoints, deleting old ones, and removing the files of killed saves."""

from __future__ import annotations

import re
from collections.abc import Mapping
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
    """The folder and the step of a complete checkpoint."""

    path: str
    step: int


def find_checkpoints(checkpoints_path: str) -> list[CheckpointInfo]:
    """Returns the complete checkpoints in a folder, oldest first; none if the folder does not exist.

    A checkpoint is complete if it has a manifest. Its bytes are not checked here: a damaged checkpoint is listed,
    and reading it raises an error instead of silently falling back to an older one.
    """
    return [found for found in _step_folders(checkpoints_path) if is_complete(found.path)]


def is_complete(path: str) -> bool:
    """Returns whether there is a complete checkpoint; one that is being deleted is none any more."""
    return MANIFEST_NAME in storage.list_files(path)


def latest_checkpoint(checkpoints_path: str, before: str | None = None) -> str | None:
    """Returns the path of the newest complete checkpoint, or None if there is none.

    Args:
        checkpoints_path: folder of the run's checkpoints.
        before: path of a checkpoint; only checkpoints of earlier steps are considered.
    """
    found = find_checkpoints(checkpoints_path)
    if before is not None:
        found = [checkpoint for checkpoint in found if checkpoint.step < (step_of(storage.base_name(before)) or 0)]
    return found[-1].path if found else None


def newest_whole(checkpoints_path: str, before: str) -> str | None:
    """Returns the path of the newest undamaged checkpoint earlier than `before`, or None; reads every byte."""
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
    """Returns on every rank the result of `latest_checkpoint` on rank 0.

    Collective: every rank. If each rank looked for itself, ranks could find different checkpoints.
    """
    return on_first_rank(
        f"cannot find the latest checkpoint in {checkpoints_path}",
        lambda: latest_checkpoint(checkpoints_path, before),
        ranks,
    )


_SMALLEST = re.compile(r"(.*_)?(loss|entropy)")
_LARGEST = re.compile(
    r"(.*_)?(auc|recall|ndcg|hit|hits|hit_rate|mrr|map|precision|similarity|accuracy|coverage)(@\d+)?"
)


def mode_of_best(metric: str, mode: Literal["auto", "min", "max"]) -> Literal["min", "max"]:
    """Returns "min" if small values of a metric are better, "max" if large values are.

    Args:
        metric: the metric's name.
        mode: `checkpoint.best_mode`; "auto" infers the mode from the name.

    Raises:
        UserError: the mode is "auto" and the name is not one of embedtrain's metrics.
    """
    if mode != "auto":
        return mode
    if _SMALLEST.fullmatch(metric):
        return "min"
    if _LARGEST.fullmatch(metric):
        return "max"
    raise UserError(
        f"checkpoint.best_metric={metric} does not tell whether small or large values are better: set "
        "checkpoint.best_mode=min or checkpoint.best_mode=max"
    )


def num_best(keep_best: int | None, patience: int | None) -> int | None:
    """Returns how many best checkpoints a run keeps: by default one if the run may stop early, otherwise None.

    Args:
        keep_best: `checkpoint.keep_best`.
        patience: `train.early_stop.patience`.
    """
    return 1 if keep_best is None and patience is not None else keep_best


@dataclass(frozen=True)
class Retention:
    """Says which checkpoints are kept: those that match any rule. If all rules are None, all are kept.

    Attributes:
        keep_last: number of newest checkpoints to keep.
        keep_every: keep checkpoints whose step is a multiple of this.
        keep_best: number of best checkpoints to keep. Of checkpoints with the same measurement the first counts.
        best_metric: name of the metric in a checkpoint's `state["metrics"]`. `state["measured_at"]` gives the step of
            the measurement; by default it is the checkpoint's own step.
        best_mode: whether small or large values are better; see `mode_of_best`.

    Raises:
        UserError: a number is less than 1, or the mode cannot be inferred from the metric's name.
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
                raise UserError(f"{name} must be at least 1, or none to disable the rule, got {value}")


def retain(checkpoints_path: str, retention: Retention, ranks: Ranks) -> list[str]:
    """Deletes the complete checkpoints that no rule keeps.

    The newest checkpoint whose files all exist with their full size is always kept, and so are the checkpoints that
    a kept delta changes. The manifest is deleted first, so that a partly deleted checkpoint counts as incomplete.

    Collective: every rank.

    Returns:
        The paths of the deleted checkpoints.

    Raises:
        CheckpointError: a checkpoint cannot be read or deleted.
    """

    def delete_old() -> list[str]:
        found = find_checkpoints(checkpoints_path)
        kept = _kept(found, retention)
        # Newest first: a delta is deleted before the checkpoint that it changes.
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
    """Returns the steps of the checkpoints to keep."""
    if (retention.keep_last, retention.keep_every, retention.keep_best) == (None, None, None):
        return {checkpoint.step for checkpoint in found}
    sound = _sound_manifests(found)
    if not sound:
        return {checkpoint.step for checkpoint in found}
    steps = sorted(sound)
    # Checkpoints newer than the newest sound one are damaged: they are kept for inspection and not counted.
    kept = {checkpoint.step for checkpoint in found if checkpoint.step > steps[-1]}
    kept.update(steps[-(retention.keep_last or 1) :])
    if retention.keep_every:
        kept.update(step for step in steps if step % retention.keep_every == 0)
    if retention.keep_best:
        kept.update(_best_steps(sound, retention))
    for step in reversed(steps):
        parent = sound[step].parent
        if step in kept and parent is not None:
            kept.add(parent.step)
    return kept


def _best_steps(sound: Mapping[int, Manifest], retention: Retention) -> list[int]:
    """Returns the steps of the best checkpoints, one step per measurement."""
    metric, sign = retention.best_metric, 1 if mode_of_best(retention.best_metric, retention.best_mode) == "min" else -1
    # A checkpoint saved between two measurements repeats the earlier measurement.
    first_of: dict[int, tuple[float, int]] = {}
    for step in sorted(sound):
        state = sound[step].state
        value = state.get("metrics", {}).get(metric)
        if value is not None:
            first_of.setdefault(state.get("measured_at", {}).get(metric, step), (sign * value, step))
    return [step for _, step in sorted(first_of.values())[: retention.keep_best]]


def _sound_manifests(found: list[CheckpointInfo]) -> dict[int, Manifest]:
    """Returns, by step, the manifests of checkpoints whose files and ancestors all exist with their full size."""
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
    """Removes the files of killed saves: files that no manifest lists.

    Collective: every rank. Only the job that owns the folder may call it, and not during a save: a running save
    looks like a killed one.

    Returns:
        The paths of the removed files.

    Raises:
        CheckpointError: a file cannot be removed.
    """

    def sweep() -> list[str]:
        removed = []
        for folder in _step_folders(checkpoints_path):
            try:
                removed += _remove_attempt_files(folder.path, keep=_listed_files(folder.path))
            except CheckpointError:
                # A damaged or newer manifest does not tell which files belong to it: no file is removed.
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
    """Returns the files of the complete checkpoint in a folder; none if there is no complete checkpoint."""
    if MANIFEST_NAME not in storage.list_files(path):
        return frozenset()
    return frozenset(read_manifest(path).files)


def _remove_attempt_files(path: str, keep: frozenset[str]) -> list[str]:
    """Removes the files that saves wrote to a step's folder, except `keep`, and the folder if it is then empty."""
    removed = []
    for name in sorted(storage.list_files(path)):
        if is_attempt_file(name) and name not in keep:
            storage.remove(storage.join(path, name))
            removed.append(storage.join(path, name))
    storage.remove_empty_folder(path)
    return removed
