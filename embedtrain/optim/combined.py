"""Several optimizers for different tables that step together."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from embedtrain.ops.row_gradient import RowGradient
from embedtrain.optim.optimizer import EffectiveRates, NonFinitePolicy, SparseOptimizer
from embedtrain.optim.stores import RowStore, RowsToUpdate


class _Groups:
    def __init__(self, table_groups: list[RowStore]) -> None:
        self.table_groups = table_groups


class Combined(SparseOptimizer):
    """Combines optimizers of different tables of one collection; a step applies all of them or none.

    `param_groups` contains the parameter groups of all the optimizers in order. Change the groups here: changes to the
    original optimizers' `param_groups` have no effect.

    Args:
        optimizers: two or more optimizers of different table groups; see `EmbeddingCollection.trained_by`.
        max_grad_norm: largest gradient norm over all tables together; see `CommonOptions`.
        nonfinite: see `CommonOptions`.

    Raises:
        ValueError: two optimizers share a table, or one of them sets `max_grad_norm` or `nonfinite` itself.
    """

    takes_over = True

    def __init__(
        self,
        *optimizers: SparseOptimizer,
        max_grad_norm: float | None = None,
        nonfinite: NonFinitePolicy = "error",
    ) -> None:
        stores = [store for optimizer in optimizers for store in optimizer.stores]
        names = [name for store in stores for name in store.table_names]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"more than one optimizer has the tables {', '.join(repeated)}")
        for optimizer in optimizers:
            if optimizer.max_grad_norm is not None or optimizer.nonfinite != "error":
                raise ValueError("max_grad_norm and nonfinite apply to all tables together: pass them to Combined")
        self._optimizers = optimizers
        self._owners = {store.table_names[0]: optimizer for optimizer in optimizers for store in optimizer.stores}
        super().__init__(_Groups(stores), {"lr": 0.0}, max_grad_norm=max_grad_norm, nonfinite=nonfinite)
        settings = [settings for optimizer in optimizers for settings in optimizer.param_groups]
        for own, given in zip(self.param_groups, settings, strict=True):
            own.clear()
            own.update(given)

    @property
    def name(self) -> str:
        """The optimizers' names in a checkpoint, joined by "+"."""
        return "+".join(optimizer.name for optimizer in self._optimizers)

    def update(
        self, store: RowsToUpdate, gradient: RowGradient, settings: dict[str, Any], grad_factor: float | Tensor = 1.0
    ) -> None:
        """Applies the formula of the optimizer that owns the parameter group."""
        self._owners[settings["tables"][0]].update(store, gradient, settings, grad_factor)

    def row_rates(self, store: RowsToUpdate, rows: Tensor, settings: dict[str, Any]) -> Tensor | None:
        """See `SparseOptimizer.row_rates`."""
        return self._owners[settings["tables"][0]].row_rates(store, rows, settings)

    def leaves_out_rows(self, settings: dict[str, Any]) -> bool:
        """See `SparseOptimizer.leaves_out_rows`."""
        return self._owners[settings["tables"][0]].leaves_out_rows(settings)

    def effective_rates(self, group: int, rows: slice) -> EffectiveRates | None:
        """See `SparseOptimizer.effective_rates`."""
        store = self.stores[group]
        owner = self._owners[store.table_names[0]]
        own = next(number for number, other in enumerate(owner.stores) if other is store)
        owner.param_groups[own].update(self.param_groups[group])
        return owner.effective_rates(own, rows)

    def reset_state(self) -> None:
        """See `SparseOptimizer.reset_state`."""
        super().reset_state()
        for optimizer in self._optimizers:
            optimizer.reset_state()
