"""The reference implementation in one process and plain PyTorch; tests compare the sharded tables with it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.embedding.features import resolve_features
from embedtrain.embedding.ids import valid_bags
from embedtrain.embedding.init import initial_rows
from embedtrain.jagged import Jagged
from embedtrain.ops._backend.mix import mix64
from embedtrain.ops.row_gradient import Delivery, RowGradient
from embedtrain.sharding.layout import layout_of
from embedtrain.spec import FeatureSpec, TableSpec


class UnshardedTable:
    """Holds one table as a dense parameter; an optimizer uses it in place of a `TableGroup`.

    Attributes:
        weight: [num_rows, dim], in the order of ids.
        state: optimizer state by name, [num_rows] or [num_rows, dim] float32.
    """

    def __init__(self, spec: TableSpec, position: int, seed: int) -> None:
        self.spec = spec
        self.ranks: Ranks = ONE_PROCESS
        self.device = torch.device("cpu")
        self.state: dict[str, Tensor] = {}
        self.layout = layout_of(spec.num_rows, kind=spec.layout)
        in_slot_order = initial_rows(spec, 0, spec.num_rows, seed)
        self.weight = in_slot_order[self.layout.slot_of(torch.arange(spec.num_rows))]
        self.leaf = self.weight.float().clone().requires_grad_()
        self.touched = torch.zeros(spec.num_rows, dtype=torch.bool)
        self.counts: Tensor | None = None
        self._position = position
        self._optimizer: weakref.ref[object] | None = None

    def look_up(self, ids: Tensor) -> Tensor:
        """Returns the rows of `ids` as float32, and marks them as touched if gradients are enabled."""
        if torch.is_grad_enabled():
            self.touched[ids] = True
        with torch.no_grad():
            self.leaf.copy_(self.weight)
        return self.leaf[ids]

    @property
    def table_names(self) -> list[str]:
        """The name of this table, as a list."""
        return [self.spec.name]

    @property
    def optimizer(self) -> object | None:
        """The optimizer that `take` was called with; None if there is none or it was deleted."""
        return None if self._optimizer is None else self._optimizer()

    def take(self, optimizer: object, settings: dict[str, Any]) -> None:
        """Sets the optimizer."""
        self._optimizer = weakref.ref(optimizer)

    def forget_state(self) -> None:
        """Removes all optimizer state."""
        self.state.clear()

    def allocate_state(self, name: str, fill: float, per_element: bool = False) -> Tensor:
        """Allocates state of one float32 per row, or per element, filled with `fill`."""
        self.state[name] = torch.full(self.weight.shape if per_element else self.weight.shape[:1], fill)
        return self.state[name]

    def fill_state(self, name: str, value: float) -> None:
        """Sets a state of all rows to `value`."""
        self.state[name].fill_(value)

    def waiting_gradient(self, *, is_padded: bool = False) -> RowGradient:
        """Returns the rows touched since the last `clear_gradient`, and their gradients."""
        rows = self.touched.nonzero().flatten()
        grad = torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad
        counts = None if self.counts is None else self.counts[rows]
        delivery = Delivery.of_rows(rows, grad[rows], counts)
        return RowGradient([delivery], num_rows=self.spec.num_rows, dim=self.spec.dim)

    def open_rows(self, gradient: RowGradient) -> tuple[UnshardedTable, RowGradient]:
        """Returns this table and the gradient."""
        return self, gradient

    def close_rows(self) -> None:
        """Does nothing."""

    def count(self, counts: Tensor) -> None:
        """Adds the number of terms of the loss that each row's gradient sums, [num_rows] float32; see `Delivery`."""
        self.counts = counts if self.counts is None else self.counts + counts

    def clear_gradient(self) -> None:
        """Removes the gradients."""
        self.leaf.grad, self.counts = None, None
        self.touched.zero_()

    def tables_of(self, rows: Tensor) -> Tensor:
        """Returns zeros, because this is the only table."""
        return torch.zeros_like(rows)

    def describe(self, row: int) -> str:
        """Returns the names of the table and the row, for messages."""
        return f"table {self.spec.name!r}, row {row}"

    def rounding_keys(self, gradient: RowGradient, step: int) -> Tensor | None:
        """Returns the keys for stochastic rounding, equal to `TableGroup.rounding_keys` of the same rows."""
        if self.weight.dtype != torch.bfloat16:
            return None
        rows = gradient.rows
        per_step = mix64(mix64(torch.full_like(rows, step)) + self._position)
        return per_step + self.layout.slot_of(rows)


class UnshardedEmbeddingCollection(nn.Module):
    """Computes what `EmbeddingCollection` does, in one process, without groups and deduplication.

    It is slow and simple: tests compare the sharded tables with it.

    Args:
        tables: see `EmbeddingCollection`.
        features: see `EmbeddingCollection`.
        seed: see `EmbeddingCollection`.
    """

    def __init__(
        self, tables: Sequence[TableSpec], features: Sequence[FeatureSpec] | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.features = resolve_features(tables, features)
        kinds: dict[tuple[int, torch.dtype, str, str], int] = {}
        self.tables: dict[str, UnshardedTable] = {}
        for spec in tables:
            position = kinds.setdefault(spec.group, 0)
            kinds[spec.group] += 1
            self.tables[spec.name] = UnshardedTable(spec, position, seed)

    @property
    def table_groups(self) -> list[UnshardedTable]:
        """The tables, as an optimizer updates them."""
        return list(self.tables.values())

    def forward(self, batch: Mapping[str, Jagged]) -> dict[str, Tensor]:
        """See `EmbeddingCollection.forward`."""
        return {name: self._pooled(self.features[name], bags) for name, bags in batch.items()}

    def own_rows(self, name: str) -> Tensor:
        """Returns all rows in the order of slots; see `EmbeddingCollection.own_rows`."""
        table = self.tables[name]
        return table.look_up(table.layout.id_of(torch.arange(table.spec.num_rows)))

    def gather_table(self, name: str, state: str = "weight") -> Tensor:
        """See `EmbeddingCollection.gather_table`."""
        table = self.tables[name]
        return table.weight if state == "weight" else table.state[state]

    def _pooled(self, feature: FeatureSpec, bags: Jagged) -> Tensor:
        table = self.tables[feature.table_name]
        bags = valid_bags(bags, feature, table.spec.num_rows, rank=0)
        vectors = table.look_up(bags.values.long())
        if bags.weights is not None:
            vectors = vectors * bags.weights.unsqueeze(1)
        if feature.pooling == "none":
            return vectors
        pooled = vectors.new_zeros(bags.num_bags, table.spec.dim)
        for position, bag in enumerate(vectors.split(bags.lengths.tolist())):
            pooled[position] = bag.sum(dim=0)
        if feature.pooling == "mean":
            pooled = pooled / bags.lengths.clamp(min=1).unsqueeze(1)
        return pooled
