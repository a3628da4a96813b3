"""Checkpoints: saved by all ranks as one, read on any number of ranks, verified byte by byte."""

from __future__ import annotations

from embedtrain.checkpoint.manifest import Manifest, TensorInfo
from embedtrain.checkpoint.reader import CheckpointReader, load_shards, verify
from embedtrain.checkpoint.retention import (
    CheckpointInfo,
    agree_on_latest,
    find_checkpoints,
    latest_checkpoint,
    retain,
    sweep_leftovers,
)
from embedtrain.checkpoint.view import ShardView
from embedtrain.checkpoint.writer import save_checkpoint

__all__ = [
    "CheckpointInfo",
    "CheckpointReader",
    "Manifest",
    "ShardView",
    "TensorInfo",
    "agree_on_latest",
    "find_checkpoints",
    "latest_checkpoint",
    "load_shards",
    "retain",
    "save_checkpoint",
    "sweep_leftovers",
    "verify",
]
