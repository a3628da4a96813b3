"""Where a fault can strike: functions of the package by name, and how each is made to count its moments."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

CHUNK_BYTES = 4096
"""A file is written in runs of so many bytes: a fault can strike in the midst of it."""

PHASES: dict[str, tuple[str, ...]] = {
    "step": ("embedtrain.train.trainer:train_step", "embedtrain.distributed.ranks:Ranks.all_to_all_split"),
    "staging": (
        "embedtrain.embedding.collection:EmbeddingCollection.shard_views",
        "embedtrain.embedding.row_changes:RowChanges.snapshot",
        "embedtrain.embedding.row_changes:RowSnapshot.preserve",
        "embedtrain.checkpoint.writer:encode_header",
    ),
    "writing": (
        "embedtrain.storage:write",
        "embedtrain.storage:make_folder",
        "embedtrain.embedding.row_changes:RowSnapshot.finish",
        "os:fsync",
    ),
    "committing": (
        "embedtrain.storage:create",
        "embedtrain.checkpoint.writer:encode",
        "embedtrain.checkpoint.saver:CheckpointSaver.settle",
        "os:link",
    ),
    "deleting": ("embedtrain.storage:remove", "embedtrain.storage:remove_empty_folder"),
}
"""Phase of a run -> "module:attribute" of its functions, in the namespace where they are looked up.

Staging begins in the step's thread, and goes on in both while rows are copied on write; what follows happens in the
background while the run trains on.
"""

DISK_PHASES = {
    phase: touching
    for phase, points in PHASES.items()
    if (touching := tuple(point for point in points if point.startswith(("embedtrain.storage:", "os:"))))
}
"""Those of them that touch the disk."""


def patch(point: str, tick: Callable[[str], None]) -> None:
    """Has a function call `tick(point)` before and after each call, and between the chunks that it writes."""
    module_name, _, path = point.partition(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for each in outer:
        owner = getattr(owner, each)
    original = getattr(owner, name)

    def counted(*arguments: Any, **options: Any) -> Any:
        tick(point)
        if point.endswith("storage:write"):
            url, chunks = arguments
            arguments = (url, _Ticking(chunks, lambda: tick(point)))
        result = original(*arguments, **options)
        tick(point)
        return result

    setattr(owner, name, counted)


class _Ticking:
    """Chunks cut into smaller ones with a tick before each; as often as they can be had."""

    def __init__(self, chunks: Iterable[bytes | memoryview], tick: Callable[[], None]) -> None:
        self._chunks = chunks
        self._tick = tick

    def __iter__(self) -> Iterator[bytes | memoryview]:
        for chunk in self._chunks:
            for start in range(0, len(chunk), CHUNK_BYTES):
                self._tick()
                yield chunk[start : start + CHUNK_BYTES]
