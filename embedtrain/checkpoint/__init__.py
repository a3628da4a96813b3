"""Checkpoints: all ranks save one checkpoint, any number of ranks loads it, and every byte has a checksum."""

from __future__ import annotations

from embedtrain.checkpoint.choice import choose_checkpoint
from embedtrain.checkpoint.compaction import compact
from embedtrain.checkpoint.loading import LoadOptions, load_shards
from embedtrain.checkpoint.manifest import Manifest, TensorInfo
from embedtrain.checkpoint.reader import CheckpointReader, verify
from embedtrain.checkpoint.retention import (
    CheckpointInfo,
    Retention,
    agree_on_latest,
    find_checkpoints,
    is_complete,
    latest_checkpoint,
    newest_whole,
    remove_checkpoint,
    retain,
    sweep_leftovers,
)
from embedtrain.checkpoint.saver import CheckpointSaver, SaveOptions
from embedtrain.checkpoint.writer import save_checkpoint
from embedtrain.embedding.row_changes import RowChanges
from embedtrain.embedding.shard_view import ShardView

__all__ = [
    "CheckpointInfo",
    "CheckpointReader",
    "CheckpointSaver",
    "LoadOptions",
    "Manifest",
    "Retention",
    "RowChanges",
    "SaveOptions",
    "ShardView",
    "TensorInfo",
    "agree_on_latest",
    "choose_checkpoint",
    "compact",
    "find_checkpoints",
    "is_complete",
    "latest_checkpoint",
    "load_shards",
    "newest_whole",
    "remove_checkpoint",
    "retain",
    "save_checkpoint",
    "sweep_leftovers",
    "verify",
]
