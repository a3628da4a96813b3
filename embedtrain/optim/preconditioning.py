"""Preconditioning: changes the gradients of an applied step before the formula uses them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.ops.damp_rows import Damping
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.optim.stores import RowStore, RowsToUpdate


class Touched(NamedTuple):
    """Holds the rows of a table group that a step touched on this rank, before their update.

    Attributes:
        store: the rows and their states.
        gradient: the gradient of the rows. Do not change its `values`: they may share memory with backward.
        places: [n] int64; positions of the gradient's rows in `store`.
        table_names: names of the tables of the group.
        tables: [n] int64; index into `table_names` for each row.
        rates: [n] float32; effective learning rate of each row before the step updates the state: the learning rate
            divided by the divisor. A mean over dim if each element has its own divisor. None if the formula does not
            define it, as with momentum.
    """

    store: RowsToUpdate
    gradient: RowGradient
    places: Tensor
    table_names: Sequence[str]
    tables: Tensor
    rates: Tensor | None


Opened = tuple[RowsToUpdate, RowGradient]
"""A result of `RowStore.open_rows`: rows, and a gradient whose row numbers are positions in them."""


class Preconditioner(Protocol):
    """A callable that changes the gradients of the rows that a step touched."""

    def __call__(self, touched: Sequence[Touched], ranks: Ranks) -> Sequence[Tensor | Damping]:
        """Returns the new gradient of each table group.

        It is a tensor of values, [n, dim] float32, or a `Damping` of the gradient's rows, which the update applies
        without storing the damped values. The new gradient must not depend on the world size or on which rank owns a
        row.

        Collective: every rank, in each step that is applied.
        """


class HasRates(Protocol):
    """The part of `SparseOptimizer` that preconditioning uses."""

    stores: list[RowStore]
    param_groups: list[dict[str, Any]]

    def row_rates(self, store: RowsToUpdate, rows: Tensor, settings: dict[str, Any]) -> Tensor | None:
        """See `SparseOptimizer.row_rates`."""


def preconditioned(
    optimizer: HasRates, preconditioner: Preconditioner, gradients: Sequence[RowGradient], opened: Sequence[Opened]
) -> list[Opened]:
    """Returns the opened rows of each table group with preconditioned gradients.

    Collective: every rank.
    """
    each = zip(optimizer.stores, gradients, opened, optimizer.param_groups, strict=True)
    touched = [
        Touched(
            rows,
            gradient,
            placed.rows,
            store.table_names,
            store.tables_of(gradient.rows),
            optimizer.row_rates(rows, placed.rows, settings),
        )
        for store, gradient, (rows, placed), settings in each
    ]
    changed = preconditioner(touched, optimizer.stores[0].ranks)
    return [(rows, _changed(placed, own)) for (rows, placed), own in zip(opened, changed, strict=True)]


def _changed(placed: RowGradient, change: Tensor | Damping) -> RowGradient:
    if isinstance(change, Damping):
        return placed.damped(change)
    return RowGradient.of_rows(placed.rows, change, placed.num_rows)
