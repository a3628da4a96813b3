"""Declarations of tables and of the features that are looked up in them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, SupportsIndex, get_args

import torch

Pooling = Literal["none", "sum", "mean"]
InvalidIds = Literal["error", "hash", "drop"]
PoolAt = Literal["auto", "example", "owner"]
Init = Literal["uniform", "normal", "zeros"]

DEFAULT_OPTIMIZER = "default"
"""Default of `TableSpec.optimizer`."""
DEFAULT_LAYOUT = "spread"
"""Default of `TableSpec.layout`."""

DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class TableSpec:
    """Declares one embedding table.

    Attributes:
        name: unique in its collection; part of tensor names in a checkpoint, so it must not contain "/".
        num_rows: number of rows; valid ids are 0 to num_rows - 1.
        dim: length of the vectors.
        dtype: dtype of the stored weights, float32 or bfloat16 (updated with stochastic rounding). The collection
            returns float32 vectors, and optimizer state is float32, in both cases.
        init: distribution of the initial values.
        init_scale: half-width of "uniform", standard deviation of "normal"; None for `1 / sqrt(dim)`.
        optimizer: a name of your choice that assigns the table to one of several optimizers of a collection; see
            `EmbeddingCollection.trained_by`.
        layout: a name in `embedtrain.sharding.layout.LAYOUTS`.
    """

    name: str
    num_rows: int
    dim: int
    dtype: torch.dtype = torch.float32
    init: Init = "uniform"
    init_scale: float | None = None
    optimizer: str = DEFAULT_OPTIMIZER
    layout: str = DEFAULT_LAYOUT

    @property
    def group(self) -> tuple[int, torch.dtype, str, str]:
        """Key of the table group; tables with equal keys share their exchange."""
        return self.dim, self.dtype, self.optimizer, self.layout

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "/" in self.name:
            raise ValueError(f"a table's name must be a non-empty string without '/', got {self.name!r}")
        for name in ("num_rows", "dim"):
            if not isinstance(value := getattr(self, name), SupportsIndex):
                raise ValueError(f"table {self.name!r}: {name} must be an integer, got {value!r}")
        if self.num_rows < 1 or self.dim < 1:
            raise ValueError(
                f"table {self.name!r}: num_rows and dim must be at least 1, got {self.num_rows} and {self.dim}"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"table {self.name!r}: dtype must be float32 or bfloat16, got {self.dtype}")
        if self.init not in get_args(Init):
            raise ValueError(f"table {self.name!r}: init must be one of {get_args(Init)}, got {self.init!r}")
        if self.init_scale is not None and not 0 <= self.init_scale < math.inf:
            raise ValueError(f"table {self.name!r}: init_scale must be finite and >= 0, got {self.init_scale}")


@dataclass(frozen=True)
class FeatureSpec:
    """Declares a named input that is looked up in one table; several features may share a table.

    Attributes:
        name: unique in its collection.
        table: name of the table; None for the feature's own name.
        pooling: "none" gives one vector per id; "sum" and "mean" give one vector per bag, zeros for an empty bag.
        invalid_ids: handling of ids out of range: "error" raises on every rank, "hash" maps them into the table, "drop"
            removes them from their bags.
        pool_at: the rank that pools bags if there are several ranks. "example": the rank of the example, which receives
            each distinct row. "owner": the owner of the rows, which sends one sum per bag. "auto": whichever sends
            fewer bytes.
    """

    name: str
    table: str | None = None
    pooling: Pooling = "none"
    invalid_ids: InvalidIds = "error"
    pool_at: PoolAt = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"a feature's name must be a string, got {self.name!r}")
        for name, choices in (("pooling", Pooling), ("invalid_ids", InvalidIds), ("pool_at", PoolAt)):
            if (value := getattr(self, name)) not in get_args(choices):
                raise ValueError(f"feature {self.name!r}: {name} must be one of {get_args(choices)}, got {value!r}")
        if self.invalid_ids == "drop" and self.pooling == "none":
            raise ValueError(
                f"feature {self.name!r}: invalid_ids='drop' needs pooling 'sum' or 'mean', "
                "because without pooling every id must give a vector"
            )
        if self.pool_at == "owner" and self.pooling == "none":
            raise ValueError(f"feature {self.name!r}: pool_at='owner' needs pooling 'sum' or 'mean'")

    @property
    def table_name(self) -> str:
        """Name of the table in which this feature is looked up."""
        return self.name if self.table is None else self.table
