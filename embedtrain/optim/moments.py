"""Base of the optimizers that keep running moments of the gradient."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_update import Moments, moment_update
from embedtrain.optim.optimizer import (
    CommonOptions,
    EffectiveRates,
    HasRowGroups,
    RowState,
    RowsToUpdate,
    SparseOptimizer,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MomentOptimizer(SparseOptimizer):
    """An optimizer of the form that `embedtrain.ops.row_update.Moments` gives, which has a native kernel.

    Args:
        collection: the tables.
        defaults: hyperparameters; `lr` among them.
        first: the state of first moments, of each element; None where there are none.
        second: the state of second moments; None where there are none.
        options: see `SparseOptimizer`.
    """

    def __init__(
        self,
        collection: HasRowGroups,
        defaults: dict[str, Any],
        *,
        first: RowState | None = None,
        second: RowState | None = None,
        **options: Unpack[CommonOptions],
    ) -> None:
        states = [state for state in (first, second) if state is not None]
        super().__init__(collection, defaults, states, **options)
        self.first, self.second = first, second

    @abstractmethod
    def moments(self, settings: dict[str, Any]) -> Moments:
        """Returns the formula's coefficients at a step; `settings` is the parameter group."""

    def update(
        self, store: RowsToUpdate, gradient: RowGradient, settings: dict[str, Any], grad_factor: float | Tensor = 1.0
    ) -> None:
        """Applies the formula to the rows of a gradient times a factor; `settings` is the parameter group."""
        first, second = (None if state is None else store.state[state.name] for state in (self.first, self.second))
        step = self.row_step(store, gradient, settings, grad_factor)
        moment_update(store.weight, first, second, gradient, step, self.moments(settings))

    def effective_rates(self, group: int, rows: slice) -> EffectiveRates | None:
        """See `SparseOptimizer.effective_rates`."""
        if self.second is None:
            return None
        settings = self.param_groups[group]
        # Before the first step nothing is corrected yet.
        settings = {**settings, "step": max(settings["step"], 1)}
        moments = self.moments(settings)
        state = self.stores[group].state[self.second.name][rows]
        state = state if state.dim() == 2 else state.unsqueeze(1)
        divisors = state.sqrt() / moments.second_correction + moments.eps
        rates = (self.rate(settings) / divisors).mean(dim=1)
        return EffectiveRates(rates, state.mean(dim=1), (state == self.second.fill).all(dim=1))
