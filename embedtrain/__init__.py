"""embedtrain: sharded embedding tables with sparse optimizers, trained with torchrun."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "distributed.ranks": ("Ranks",),
    "distributed.runtime": ("Runtime", "init_distributed", "shut_down"),
    "distributed.shared_memory": ("ranks_of",),
    "embedding.collection": ("EmbeddingCollection",),
    "embedding.init_from": ("InitCounts", "init_from"),
    "embedding.unsharded": ("UnshardedEmbeddingCollection",),
    "errors": ("BadIdError", "CheckpointError", "CorruptCheckpointError", "NonFiniteError", "UserError"),
    "jagged": ("Jagged",),
    "spec": ("FeatureSpec", "TableSpec"),
}
"""The module of each public name. It is imported when the name is first used: the help and the completion of the
command line need no torch, whose import takes seconds."""


def __getattr__(name: str) -> Any:
    """Returns a public name, and imports its module first."""
    if name == "optim":
        return importlib.import_module("embedtrain.optim")
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"embedtrain.{home}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'embedtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Returns the names that the module has, those not yet imported included."""
    return sorted({*globals(), *__all__})
