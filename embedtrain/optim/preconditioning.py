"""What may change the gradients of rows between the agreement on a step and the formula."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.optim.stores import RowStore, RowsToUpdate


class Touched(NamedTuple):
    """The rows of a group of tables that a step touched on this rank, before their update.

    Attributes:
        store: holds the rows and their state.
        gradient: of the rows; its `values` may lie in the memory of backward, and are not to be changed.
        places: [n] int64; where the gradient's rows lie in the store.
        table_names: the tables of the group.
        tables: [n] int64; the position among them of each row's table.
        rates: [n] float32; how far a step would move each row per unit of gradient, before it adds to the state: the
            learning rate over the divisor, a mean over dim if each element has its own. None if the formula has no
            such number, as with momentum.
    """

    store: RowsToUpdate
    gradient: RowGradient
    places: Tensor
    table_names: Sequence[str]
    tables: Tensor
    rates: Tensor | None


Opened = tuple[RowsToUpdate, RowGradient]
"""What holds a gradient's rows for an update, and the gradient by their places in it; or a piece of it."""


class Preconditioner(Protocol):
    """Changes the gradients of the rows that a step touched."""

    def __call__(self, touched: Sequence[Touched], ranks: Ranks) -> Sequence[Iterable[tuple[slice, Tensor]]]:
        """Returns for each group of tables what takes the place of its gradient's values: [n, dim] float32, in pieces.

        Each piece of rows is updated before the next one is asked for. What a piece depends on of other rows is
        therefore computed before the call returns. Rows of no piece are left as they are. The values may not depend on
        how rows are spread over the ranks.

        Collective: every rank, at each step that is applied.
        """


class HasRates(Protocol):
    """An optimizer as preconditioning sees it; see `SparseOptimizer`."""

    stores: list[RowStore]
    param_groups: list[dict[str, Any]]

    def row_rates(self, store: RowsToUpdate, rows: Tensor, settings: dict[str, Any]) -> Tensor | None:
        """See `SparseOptimizer.row_rates`."""


def preconditioned(
    optimizer: HasRates, preconditioner: Preconditioner, gradients: Sequence[RowGradient], opened: Sequence[Opened]
) -> Sequence[Iterable[Opened]]:
    """Returns per group of tables its opened rows with the gradients that the preconditioner makes of theirs.

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
