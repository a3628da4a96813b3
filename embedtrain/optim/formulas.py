"""The built-in sparse optimizers, which keep running moments of the gradient.

Each class is the only declaration of its optimizer. The configuration takes the options, their types and their
defaults from the keyword arguments of the constructor. The settings page takes their descriptions from the docstring.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_update import Moments, moment_update
from embedtrain.optim.optimizer import EffectiveRates, SparseOptimizer, check_share
from embedtrain.optim.stores import HasTableGroups, RowState, RowsToUpdate

ACCUMULATOR = "accumulator"
"""Name of Adagrad's state in a checkpoint."""
FIRST, SECOND = "exp_avg", "exp_avg_sq"
"""Names of Adam's states in a checkpoint, as in `torch.optim.Adam`."""
SQUARE_AVERAGE = "square_avg"
"""Name of RMSprop's state in a checkpoint, as in `torch.optim.RMSprop`."""


class MomentOptimizer(SparseOptimizer):
    """Base class of the optimizers whose formula `embedtrain.ops.row_update.Moments` expresses; they have fast kernels.

    Args:
        collection: the tables.
        defaults: hyperparameters, `lr` included.
        first: state tensor of the first moments, per element; None if the formula has none.
        second: state tensor of the second moments, per element or per row; None if the formula has none.
        options: see `CommonOptions`.
    """

    def __init__(
        self,
        collection: HasTableGroups,
        defaults: dict[str, Any],
        *,
        first: RowState | None = None,
        second: RowState | None = None,
        **options: Any,
    ) -> None:
        states = [state for state in (first, second) if state is not None]
        super().__init__(collection, defaults, states, **options)
        self.first, self.second = first, second

    @abstractmethod
    def moments(self, settings: dict[str, Any]) -> Moments:
        """Returns the formula's coefficients for a step; `settings` is the parameter group."""

    def update(
        self, store: RowsToUpdate, gradient: RowGradient, settings: dict[str, Any], grad_factor: float | Tensor = 1.0
    ) -> None:
        """Applies the formula to the rows of a gradient; see `SparseOptimizer.update`."""
        first, second = (None if state is None else store.state[state.name] for state in (self.first, self.second))
        step = self.row_step(store, gradient, settings, grad_factor)
        moment_update(store.weight, first, second, gradient, step, self.moments(settings))

    def row_rates(self, store: RowsToUpdate, rows: Tensor, settings: dict[str, Any]) -> Tensor | None:
        """Returns the effective learning rates of rows; see `SparseOptimizer.row_rates`.

        None with first moments, or if the second moments start at zero: the rate of a new row is then unknown.
        """
        if self.first is not None or (self.second is not None and not self.second.fill > 0):
            return None
        rate = self.rate(settings)
        if self.second is None:
            return torch.full(rows.shape, rate, dtype=torch.float32, device=rows.device)
        moments = self.moments(settings)
        rates = rate / (store.state[self.second.name][rows].sqrt() / moments.second_correction + moments.eps)
        return rates if rates.dim() == 1 else rates.mean(dim=1)

    def leaves_out_rows(self, settings: dict[str, Any]) -> bool:
        """See `SparseOptimizer.leaves_out_rows`."""
        # The kernels ignore padding; a subclass that overrides `update` may not.
        return type(self).update is MomentOptimizer.update

    def effective_rates(self, group: int, rows: slice) -> EffectiveRates | None:
        """See `SparseOptimizer.effective_rates`."""
        if self.second is None:
            return None
        settings = self.param_groups[group]
        # At step 0 the bias corrections of Adam would be zero.
        settings = {**settings, "step": max(settings["step"], 1)}
        moments = self.moments(settings)
        state = self.stores[group].state[self.second.name][rows]
        state = state if state.dim() == 2 else state.unsqueeze(1)
        divisors = state.sqrt() / moments.second_correction + moments.eps
        rates = (self.rate(settings) / divisors).mean(dim=1)
        return EffectiveRates(rates, state.mean(dim=1), (state == self.second.fill).all(dim=1))


class SGD(MomentOptimizer):
    """Stochastic gradient descent without momentum: `row -= lr * g` for each touched row. It keeps no state.

    Args:
        collection: the tables.
        lr: learning rate.
        options: see `CommonOptions`.

    Raises:
        ValueError: a hyperparameter is out of range.
    """

    def __init__(self, collection: HasTableGroups, *, lr: float = 0.01, **options: Any) -> None:
        super().__init__(collection, {"lr": lr}, **options)

    def moments(self, settings: dict[str, Any]) -> Moments:
        """Returns the coefficients of an update without moments."""
        return Moments()


class Adagrad(MomentOptimizer):
    """Adagrad with one accumulator per element, which sums the squares of the element's gradients.

    For each touched row: `state += g * g`, then `row -= lr_t * g / (sqrt(state) + eps)`.

    Args:
        collection: the tables.
        lr: learning rate.
        eps: added outside the square root.
        initial_accumulator_value: initial value of every accumulator.
        lr_decay: `lr_t = lr / (1 + (step - 1) * lr_decay)`.
        options: see `CommonOptions`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Duchi et al. 2011, "Adaptive subgradient methods"; hyperparameters as `torch.optim.Adagrad`.
    """

    def __init__(
        self,
        collection: HasTableGroups,
        *,
        lr: float = 0.01,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        lr_decay: float = 0.0,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
            "lr_decay": lr_decay,
        }
        second = RowState(ACCUMULATOR, per_element=True, fill=initial_accumulator_value)
        super().__init__(collection, defaults, second=second, **options)

    def moments(self, settings: dict[str, Any]) -> Moments:
        """Returns the coefficients for a sum of squares."""
        return Moments(eps=settings["eps"])

    def rate(self, settings: dict[str, Any]) -> float:
        """Returns `lr_t`."""
        return _decayed_rate(settings)


class RowwiseAdagrad(MomentOptimizer):
    """Adagrad with one float32 accumulator per row, which sums the mean squares of the row's gradients.

    For each touched row: `state += mean(g * g)`, then `row -= lr_t * g / (sqrt(state) + eps)`.

    Args:
        collection: the tables.
        lr: learning rate.
        eps: added outside the square root.
        initial_accumulator_value: initial value of every accumulator.
        lr_decay: `lr_t = lr / (1 + (step - 1) * lr_decay)`.
        accumulator_decay: replaces the sum by an exponential moving average, so that the steps do not shrink for ever:
            `state = accumulator_decay * state + (1 - accumulator_decay) * mean(g * g)`. None sums.
        options: see `CommonOptions`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Duchi et al. 2011, "Adaptive subgradient methods"; one accumulator per row as in Lerer et al. 2019
    (PyTorch-BigGraph); hyperparameters as `torch.optim.Adagrad`.
    """

    def __init__(
        self,
        collection: HasTableGroups,
        *,
        lr: float = 0.01,
        eps: float = 1e-10,
        initial_accumulator_value: float = 0.0,
        lr_decay: float = 0.0,
        accumulator_decay: float | None = None,
        **options: Any,
    ) -> None:
        if accumulator_decay is not None:
            check_share("accumulator_decay", accumulator_decay)
        defaults = {
            "lr": lr,
            "eps": eps,
            "initial_accumulator_value": initial_accumulator_value,
            "lr_decay": lr_decay,
            "accumulator_decay": accumulator_decay,
        }
        super().__init__(collection, defaults, second=RowState(ACCUMULATOR, fill=initial_accumulator_value), **options)

    def moments(self, settings: dict[str, Any]) -> Moments:
        """Returns the coefficients for a sum of mean squares, or for an average if `accumulator_decay` is set."""
        decay = settings["accumulator_decay"]
        if decay is None:
            return Moments(eps=settings["eps"])
        return Moments(second_decay=decay, second_gain=1.0 - decay, eps=settings["eps"])

    def rate(self, settings: dict[str, Any]) -> float:
        """Returns `lr_t`."""
        return _decayed_rate(settings)


class Adam(MomentOptimizer):
    """Adam for sparse rows: a step changes the moments of the rows that it touches, as in `torch.optim.SparseAdam`.

    `first += (1 - beta1) * (g - first)`, `second = beta2 * second + (1 - beta2) * g * g`, then
    `row -= lr / (1 - beta1^t) * first / (sqrt(second) / sqrt(1 - beta2^t) + eps)`, where t is the step count. With
    `decoupled_weight_decay` this is AdamW.

    `eps` is added in the same place as in `torch.optim.Adam`. SparseAdam adds it before the bias correction, so its
    first steps are shorter if gradients are as small as `eps`.

    Args:
        collection: the tables.
        lr: learning rate.
        betas: decay rates of the first and second moments.
        eps: added outside the square root.
        options: see `CommonOptions`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Kingma and Ba 2015, "Adam"; Loshchilov and Hutter 2019 for decoupled decay.
    """

    _is_rowwise = False

    def __init__(
        self,
        collection: HasTableGroups,
        *,
        lr: float = 0.001,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        for position, beta in enumerate(betas):
            check_share(f"betas[{position}]", beta)
        super().__init__(
            collection,
            {"lr": lr, "betas": tuple(betas), "eps": eps},
            first=RowState(FIRST, per_element=True),
            second=RowState(SECOND, per_element=not self._is_rowwise),
            **options,
        )

    def moments(self, settings: dict[str, Any]) -> Moments:
        """Returns the coefficients for averages, with the bias corrections of the current step."""
        beta1, beta2 = settings["betas"]
        return Moments(
            first_decay=beta1,
            first_correction=1.0 - beta1 ** settings["step"],
            second_decay=beta2,
            second_gain=1.0 - beta2,
            second_correction=math.sqrt(1.0 - beta2 ** settings["step"]),
            eps=settings["eps"],
        )


class RowwiseAdam(Adam):
    """Adam with one second moment per row: the moving average of the mean square of the row's gradient.

    Its state takes a little over half the memory of Adam's. Everything else is as in `Adam`.
    """

    _is_rowwise = True


class RMSprop(MomentOptimizer):
    """RMSprop for sparse rows: a step changes the averages of the rows that it touches.

    `state = alpha * state + (1 - alpha) * g * g`, then `row -= lr * g / (sqrt(state) + eps)`.

    Args:
        collection: the tables.
        lr: learning rate.
        alpha: decay rate of the average.
        eps: added outside the square root.
        options: see `CommonOptions`.

    Raises:
        ValueError: a hyperparameter is out of range.

    Source: Tieleman and Hinton 2012, lecture 6.5; hyperparameters as in `torch.optim.RMSprop`. Its options `momentum`
    and `centered` are not available.
    """

    def __init__(
        self,
        collection: HasTableGroups,
        *,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        **options: Any,
    ) -> None:
        check_share("alpha", alpha)
        second = RowState(SQUARE_AVERAGE, per_element=True)
        super().__init__(collection, {"lr": lr, "alpha": alpha, "eps": eps}, second=second, **options)

    def moments(self, settings: dict[str, Any]) -> Moments:
        """Returns the coefficients for an average of squares."""
        return Moments(second_decay=settings["alpha"], second_gain=1.0 - settings["alpha"], eps=settings["eps"])


def _decayed_rate(settings: dict[str, Any]) -> float:
    """Returns `lr / (1 + (step - 1) * lr_decay)`."""
    return float(settings["lr"] / (1.0 + (settings["step"] - 1) * settings["lr_decay"]))
