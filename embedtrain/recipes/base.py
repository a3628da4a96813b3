"""What the builder of a model hands over: all of a run that differs from model to model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from embedtrain.config.sections import TableConfig
from embedtrain.distributed.runtime import Runtime
from embedtrain.embedding.collection import CollectionOptions
from embedtrain.train.run_folder import RunFolder
from embedtrain.train.task import Task


@dataclass(frozen=True)
class Pretrained:
    """Vectors of another program that a table starts from.

    Attributes:
        path: the file.
        rows: returns the row of each name.
    """

    path: str
    rows: Callable[[], Mapping[str, int]]


@dataclass(frozen=True)
class Sizes:
    """What the data say of a model's tables.

    Attributes:
        num_rows: of each table.
        bag_lengths: of the tables that bags are looked up in, the ids of a bag on average.
    """

    num_rows: Mapping[str, int]
    bag_lengths: Mapping[str, float] = field(default_factory=dict)


Check = Callable[[Sizes], None]
"""Called on every rank before any table is made; raises UserError where there is no room for them."""


def no_check(sizes: Sizes) -> None:
    """Finds nothing wrong."""


@dataclass(frozen=True)
class Parts:
    """What a model's configuration was turned into.

    Attributes:
        task: model, optimizers, data and evaluation.
        facts: JSON that belongs in each checkpoint: `data_fingerprint`, by which a resumed run knows its data, and
            what readers of the vectors need, such as `export_table`.
        write_files: rank 0 calls it to keep in the run folder what the vectors cannot be read without, such as the
            vocabulary.
        pretrained: by table, what it starts from in a new run.
    """

    task: Task
    facts: Mapping[str, Any]
    write_files: Callable[[RunFolder], None]
    pretrained: Mapping[str, Pretrained] = field(default_factory=dict)


def collection_options(table: TableConfig, runtime: Runtime, seed: int) -> CollectionOptions:
    """Returns what every model passes on to its tables."""
    return CollectionOptions(
        device=runtime.device,
        ranks=runtime.ranks,
        seed=seed,
        wire_dtype=None if table.wire_dtype is None else getattr(torch, table.wire_dtype),
        placement=table.placement,
        cache_bytes=table.cache_bytes,
    )
