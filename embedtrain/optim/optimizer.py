"""The step of all sparse optimizers; a subclass adds only its formula."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from embedtrain.errors import NonFiniteError
from embedtrain.ops._backend.transfer import catch_up
from embedtrain.ops.row_gradient import RowGradient
from embedtrain.ops.row_update import RowStep, row_update
from embedtrain.optim.found_inf import (
    PendingVerdict,
    Watched,
    factor_on_device,
    reason_of,
    reason_of_loss,
    total_on_device,
)
from embedtrain.optim.preconditioning import Preconditioner, preconditioned
from embedtrain.optim.stores import STEP, HasTableGroups, RowState, RowsToUpdate, StoreOptimizer

NonFinitePolicy = Literal["error", "skip"]


class EffectiveRates(NamedTuple):
    """Holds the effective learning rates of some rows: the learning rate divided by the formula's divisor.

    Attributes:
        rates: [n]; effective learning rates. A mean over dim if each element has its own divisor.
        mean_states: [n]; second moments. A mean over dim if each element has its own.
        is_untouched: [n] bool; whether the second moment still has its initial value.
    """

    rates: Tensor
    mean_states: Tensor
    is_untouched: Tensor


@dataclass(kw_only=True)
class CommonOptions:
    """Holds the options that all sparse optimizers share, in Python and in a configuration."""

    weight_decay: float = 0.0
    """L2 penalty: adds `weight_decay * row` to the gradient of each row that the step touches."""
    decoupled_weight_decay: bool = False
    """Subtract `lr * weight_decay * row` from the row itself (as AdamW) and leave the gradient unchanged."""
    maximize: bool = False
    """Maximize the objective: step along the gradient, not against it."""
    max_row_grad_norm: float | None = None
    """Largest L2 norm of one row's gradient; a larger gradient is scaled down to it. None does not clip."""
    max_norm: float | None = None
    """Largest L2 norm of a row. After each step, touched rows with a larger norm are scaled down to it. None sets no
    limit."""
    max_grad_norm: float | None = None
    """Largest L2 norm of the summed gradients of all tables and ranks together; larger gradients are scaled down to
    it, before `max_row_grad_norm` applies. None does not clip."""
    nonfinite: NonFinitePolicy = "error"
    """What to do if a gradient is not finite on some rank: "error" raises NonFiniteError on every rank; "skip" skips
    the step and counts it. In both cases no rank applies any part of the step."""


OF_A_STEP = ("max_grad_norm", "nonfinite")
"""The common options that apply to all tables together; the others may differ between table groups."""

_OPTIONS = tuple(option.name for option in fields(CommonOptions))


class SparseOptimizer(StoreOptimizer):
    """Base class of the optimizers of an embedding collection; a subclass defines its formula in `direction`.

    The optimizer has one parameter group per table group, so torch's learning-rate schedulers work. The group's
    `tables` entry lists the names of the tables. `param_groups` holds the step counts and the hyperparameters, and
    `state_dict` returns them. The state of the rows lies beside the rows in the collection and is saved with them.

    A step changes only the rows that it touches. Weight decay and moments of all other rows stay as they are.

    Args:
        collection: the tables.
        defaults: hyperparameters of the subclass's formula, `lr` included.
        states: the state tensors that the formula needs.
        options: see `CommonOptions`.

    Attributes:
        num_skipped: number of skipped steps.
        looks_later: whether `step` returns before the host knows if the gradients were finite. The device then skips a
            step that is not finite, and the next call of `step` or `settle` applies the policy `nonfinite`. The default
            is True for tables on a GPU and False for tables on the CPU.
        preconditioner: changes the gradients of an applied step before the formula uses them. None uses them unchanged.
        found_inf: scalar float32 on the device: 1 if the last step was skipped, else 0. The optimizers of torch accept
            it under this name. None before the first step, and always if `looks_later` is False.

    Raises:
        TypeError: the optimizer does not have one of the options.
        ValueError: a hyperparameter is out of range.
    """

    def __init__(
        self,
        collection: HasTableGroups,
        defaults: dict[str, Any],
        states: Sequence[RowState] = (),
        **options: Any,
    ) -> None:
        unknown = [name for name in options if name not in _OPTIONS]
        if unknown:
            raise TypeError(
                f"{type(self).__name__} does not take {', '.join(unknown)}; "
                f"it takes {', '.join([*defaults, *_OPTIONS])}"
            )
        common = CommonOptions(**options)
        self.max_grad_norm, self.nonfinite = common.max_grad_norm, common.nonfinite
        of_rows = {name: value for name, value in vars(common).items() if name not in OF_A_STEP}
        defaults = {**defaults, **of_rows}
        _check_ranges({**defaults, "max_grad_norm": self.max_grad_norm})
        if self.nonfinite not in ("error", "skip"):
            raise ValueError(f"nonfinite must be 'error' or 'skip', got {self.nonfinite!r}")
        self._veto: str | None = None
        self._watched: list[Watched] = []
        self._pending: PendingVerdict | None = None
        self.found_inf: Tensor | None = None
        self.num_skipped = 0
        self.preconditioner: Preconditioner | None = None
        self._looks_later: bool | None = None
        super().__init__(collection, defaults, states)

    @property
    def looks_later(self) -> bool:
        """Whether `step` returns before the host knows if the gradients were finite; see the class."""
        return self.stores[0].device.type == "cuda" if self._looks_later is None else self._looks_later

    @looks_later.setter
    def looks_later(self, value: bool) -> None:
        self._looks_later = value

    @property
    def name(self) -> str:
        """The optimizer's name in a checkpoint."""
        return type(self).__name__

    def direction(
        self, grad: Tensor, states: Mapping[str, Tensor], settings: dict[str, Any]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the direction of the update and updates the states of the touched rows in place.

        The base class then computes `row -= lr * direction`. It also reads and writes the rows, in float32 or bfloat16,
        and applies the options of `CommonOptions`.

        Args:
            grad: [n, dim] float32; gradients, summed over duplicates and ranks, then scaled and clipped, with the
                weight decay added.
            states: by name, [n] or [n, dim] float32; states of the touched rows.
            settings: the parameter group; its `step` already counts the current step.

        Returns:
            [n, dim]; or a tuple (numerator, denominator), which the base class divides as `torch.optim` does.
        """
        raise NotImplementedError(f"{type(self).__name__} has no formula: define direction(grad, states, settings)")

    def leaves_out_rows(self, settings: dict[str, Any]) -> bool:
        """Returns whether `update` ignores the row numbers outside the table that a padded gradient contains."""
        return False

    def rate(self, settings: dict[str, Any]) -> float:
        """Returns the learning rate of the current step."""
        return float(settings["lr"])

    def update(
        self, store: RowsToUpdate, gradient: RowGradient, settings: dict[str, Any], grad_factor: float | Tensor = 1.0
    ) -> None:
        """Applies the formula to the rows of a gradient times `grad_factor`; `settings` is the parameter group."""
        names = [state.name for state in self.states]

        def direction(grad: Tensor, touched: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
            return self.direction(grad, dict(zip(names, touched, strict=True)), settings)

        step = self.row_step(store, gradient, settings, grad_factor)
        states = [store.state[name] for name in names]
        row_update(store.weight, states, gradient.rows, gradient.values, step, direction)

    def row_step(
        self, store: RowsToUpdate, gradient: RowGradient, settings: dict[str, Any], grad_factor: float | Tensor
    ) -> RowStep:
        """Returns the parameters of an update, derived from the options."""
        return RowStep(
            lr=self.rate(settings),
            grad_factor=-grad_factor if settings["maximize"] else grad_factor,
            max_row_grad_norm=_or_infinity(settings["max_row_grad_norm"]),
            weight_decay=settings["weight_decay"],
            decoupled_weight_decay=settings["decoupled_weight_decay"],
            max_norm=_or_infinity(settings["max_norm"]),
            rounding_keys=store.rounding_keys(gradient, settings[STEP]),
        )

    def row_rates(self, store: RowsToUpdate, rows: Tensor, settings: dict[str, Any]) -> Tensor | None:
        """Returns [n] float32, the effective learning rates of rows before a step; None if the formula has none."""
        return None

    def effective_rates(self, group: int, rows: slice) -> EffectiveRates | None:
        """Returns the effective learning rates of local rows of a table group; None if the formula has no divisor."""
        return None

    def reset_state(self) -> None:
        """Resets the states of all rows to their initial values and the step counts to zero.

        Collective: every rank.
        """
        self.settle()
        for store, settings in zip(self.stores, self.param_groups, strict=True):
            settings[STEP] = 0
            for state in self.states:
                store.fill_state(state.name, state.fill)

    def veto(self, reason: str) -> None:
        """Makes all ranks treat the next step as not finite, for instance because this rank's loss is not finite."""
        self._veto = reason

    def watch(self, values: Tensor, explain: Callable[[], str | None] | None = None) -> None:
        """Makes all ranks treat the next step as not finite if one of this rank's values is not finite.

        Args:
            values: a loss, or any other tensor.
            explain: returns an error message, or None if the values are finite; required unless they are a loss.
        """
        self._watched.append(Watched(values, explain or functools.partial(reason_of_loss, values)))

    @property
    def decided(self) -> torch.cuda.Event | None:
        """The event after which the host can learn whether the last step was applied; None if it knows already."""
        return None if self._pending is None else self._pending.arrived

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Applies the gradients of the last backward passes on all ranks, or on none if one is not finite.

        Collective: every rank.

        Args:
            closure: called first; runs forward and backward and returns the loss, as in torch's optimizers.

        Returns:
            The closure's result; None without a closure.

        Raises:
            NonFiniteError: a gradient is not finite, or a rank called `veto`, and `nonfinite` is "error".
            ValueError: a GradScaler called this method.
        """
        if hasattr(self, "grad_scale"):
            raise ValueError(_NO_SCALER)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if _is_observed(self):
            _observed_step(self)
        else:
            self._step()
        return loss

    # With this flag a GradScaler sets `grad_scale` and calls `step` directly, so that `step` can refuse it.
    _step_supports_amp_scaling = True

    # torch wraps `step` to record each call for the profiler and to run hooks, unless `hooked` is set. Recording takes
    # a tenth of a small step, so `step` records only while a profiler or a hook is active.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self) -> None:
        with torch.no_grad():
            looks_later = self.looks_later
            gradients = self._collect_gradients(looks_later)
            self.settle()
            factor = self._agree_later(gradients) if looks_later else self._agree(gradients)
            if factor is not None:
                self._apply(gradients, factor)

    def _collect_gradients(self, looks_later: bool) -> list[RowGradient]:
        """Returns the gradients of the rows that this rank owns, one per table group."""
        may_pad = looks_later and self.preconditioner is None  # a preconditioner reads the state of every row
        gradients = [
            store.waiting_gradient(is_padded=may_pad and self.leaves_out_rows(settings))
            for store, settings in zip(self.stores, self.param_groups, strict=True)
        ]
        if looks_later:
            # The device decides about the last step before it counts these rows, so `settle` will not wait again.
            for gradient in gradients:
                gradient.count_rows()
        return gradients

    def _apply(self, gradients: Sequence[RowGradient], factor: float | Tensor) -> None:
        """Updates weight and state of the touched rows in one pass."""
        for settings in self.param_groups:
            settings[STEP] += 1
        opened = [store.open_rows(gradient) for store, gradient in zip(self.stores, gradients, strict=True)]
        if self.preconditioner is not None:
            opened = preconditioned(self, self.preconditioner, gradients, opened)
        for store, (rows, gradient), settings in zip(self.stores, opened, self.param_groups, strict=True):
            self.update(rows, gradient, settings, factor)
            increment_version(rows.weight)  # torch does not see what kernels write; backward checks the version
            store.close_rows()

    def settle(self) -> None:
        """Waits until the host knows whether the last step was applied. Collective: every rank.

        Raises:
            NonFiniteError: the step was not finite, and `nonfinite` is "error".
        """
        pending, self._pending = self._pending, None
        if pending is None or pending.is_finite():
            return
        for settings in self.param_groups:
            settings[STEP] -= 1
        self._handle_nonfinite(pending.gradients, pending.reason())

    def state_dict(self) -> dict[str, Any]:
        """Settles the last step and returns the state; see `StoreOptimizer.state_dict`."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Settles the last step, which could otherwise change the loaded step count; see `StoreOptimizer`."""
        self.settle()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Settles the last step and returns the state for a copy or pickle, without pending gradients.

        Collective if a step is not settled yet: every rank must copy or pickle its optimizer.
        """
        self.settle()
        return {**super().__getstate__(), "_watched": [], "_veto": None, "found_inf": None}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Discards the gradients that backward has delivered since the last step."""
        for store in self.stores:
            store.clear_gradient()

    def _agree(self, gradients: Sequence[RowGradient]) -> float | None:
        """Returns the factor that clips all gradients to the global norm, or None to skip the step.

        Collective: every rank; all get the same result.
        """
        device = gradients[0].device
        if device.type == "cuda":
            catch_up(device)
        reason, self._veto, self._watched = reason_of(self._veto, self._watched), None, []
        # The sum of squares is not finite if any gradient is not, so one number gives the norm and the check. Without
        # clipping only the check is needed, and it does not need the sums of duplicates.
        if reason is not None:
            total = math.nan
        elif self.max_grad_norm is not None:
            total = sum(gradient.sum_of_squares() for gradient in gradients)
        else:
            total = 0.0 if all([gradient.is_finite() for gradient in gradients]) else math.nan
        total = self.stores[0].ranks.sum(total, device)
        if not math.isfinite(total):
            self._handle_nonfinite(gradients, reason)
            return None
        norm = math.sqrt(total)
        if self.max_grad_norm is None or norm <= self.max_grad_norm:
            return 1.0
        return self.max_grad_norm / norm

    def _agree_later(self, gradients: Sequence[RowGradient]) -> Tensor:
        """Returns the factor for all gradients, a scalar on the device; NaN skips the step. Collective: every rank."""
        veto, watched, self._veto, self._watched = self._veto, self._watched, None, []
        total = total_on_device(gradients, watched, is_norm_wanted=self.max_grad_norm is not None)
        if veto is not None:
            total.fill_(math.nan)
        self.stores[0].ranks.all_reduce(total)
        self._pending = PendingVerdict(total, gradients, veto, watched)
        self.found_inf = (~total.isfinite()).float()
        return factor_on_device(total, self.max_grad_norm)

    def _handle_nonfinite(self, gradients: Sequence[RowGradient], reason: str | None) -> None:
        self.num_skipped += 1
        if self.nonfinite == "skip":
            return
        found = reason or self._first_nonfinite(gradients)
        if found is not None:
            found = f"{found}, on rank {self.stores[0].ranks.rank}"
        reasons = [reason for reason in self.stores[0].ranks.all_gather(found) if reason is not None]
        step = self.param_groups[0][STEP] + 1
        raise NonFiniteError(
            f"step {step}: {reasons[0]}; no rank applied any part of this step. "
            "Lower the learning rate, clip gradients (max_grad_norm), or skip such steps (nonfinite=skip)."
        )

    def _first_nonfinite(self, gradients: Sequence[RowGradient]) -> str | None:
        for store, gradient in zip(self.stores, gradients, strict=True):
            bad = (~gradient.values.isfinite()).any(dim=1).nonzero()
            if bad.numel():
                return f"the gradient of {store.describe(int(gradient.rows[bad[0, 0]]))} is not finite"
        return None


_NO_SCALER = (
    "an optimizer of tables takes no GradScaler, because a GradScaler handles torch parameters only. Use autocast with "
    "bfloat16, which needs no scaling. With float16, unscale the gradient of the vectors, "
    "vectors.register_hook(lambda grad: grad / scaler.get_scale()), set nonfinite='skip', and call optimizer.step()"
)

_observed_step = torch.optim.Optimizer.profile_hook_step(SparseOptimizer._step)


def _is_observed(optimizer: SparseOptimizer) -> bool:
    return (
        torch.autograd._profiler_enabled()
        or bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)
        or bool(_global_optimizer_pre_hooks or _global_optimizer_post_hooks)
    )


def _or_infinity(bound: float | None) -> float:
    return math.inf if bound is None else bound


_BOUNDS = ("max_row_grad_norm", "max_norm", "max_grad_norm")


def _check_ranges(settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        if name in _BOUNDS:
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
        elif isinstance(value, float | int) and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_share(name: str, value: float) -> None:
    """Raises ValueError unless `value`, a decay, lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
