"""embedtrain: sharded embedding tables with sparse optimizers, trained with torchrun."""

from __future__ import annotations

from embedtrain import optim
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.runtime import Runtime, init_distributed, shut_down
from embedtrain.distributed.shared_memory import ranks_of
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.embedding.init_from import InitCounts, init_from
from embedtrain.embedding.unsharded import UnshardedEmbeddingCollection
from embedtrain.errors import (
    BadIdError,
    CheckpointError,
    CorruptCheckpointError,
    NonFiniteError,
    UserError,
)
from embedtrain.jagged import Jagged
from embedtrain.spec import FeatureSpec, TableSpec

__version__ = "0.1.0"

__all__ = [
    "BadIdError",
    "CheckpointError",
    "CorruptCheckpointError",
    "EmbeddingCollection",
    "FeatureSpec",
    "InitCounts",
    "Jagged",
    "NonFiniteError",
    "Ranks",
    "Runtime",
    "TableSpec",
    "UnshardedEmbeddingCollection",
    "UserError",
    "init_distributed",
    "init_from",
    "optim",
    "ranks_of",
    "shut_down",
]
