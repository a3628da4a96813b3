"""Preconditioning: changes the gradients of an applied step before the formula uses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from embedtrain.distributed.ranks import Ranks
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
"""A result of `RowStore.open_rows`, or a piece of it: rows, and a gradient whose row numbers are positions in them."""


class Preconditioner(Protocol):
    """A callable that replaces the gradients of the rows that a step touched."""

    def __call__(self, touched: Sequence[Touched], ranks: Ranks) -> Sequence[Iterable[tuple[slice, Tensor]]]:
        """Returns the new gradient values of each table group, [n, dim] float32, in pieces.

        The optimizer updates the rows of a piece before it asks for the next piece. So everything that a piece needs
        from other rows must be computed before this call returns. Rows that are in no piece are not updated. The values
        must not depend on the world size or on which rank owns a row.

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
) -> Sequence[Iterable[Opened]]:
    """Returns the opened rows of each table group with preconditioned gradients, in pieces.

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
    return list(map(_pieces, opened, preconditioner(touched, optimizer.stores[0].ranks)))


def _pieces(opened: Opened, values: Iterable[tuple[slice, Tensor]]) -> Iterator[Opened]:
    rows, placed = opened
    for piece, own in values:
        yield rows, RowGradient.of_rows(placed.rows[piece], own, placed.num_rows)
