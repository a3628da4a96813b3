"""The step that every sparse optimizer shares: everything except the formula."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from embedtrain.optim.preconditioning import Opened, Preconditioner, preconditioned
from embedtrain.optim.stores import STEP, HasTableGroups, RowState, RowsToUpdate, StoreOptimizer

NonFinitePolicy = Literal["error", "skip"]


class EffectiveRates(NamedTuple):
    """How far rows would move now, if their gradient were as large as it was so far.

    Attributes:
        rates: [n]; the learning rate over the divisor, a mean over dim if each element has a divisor of its own.
        mean_states: [n]; second moments, or their means over dim.
        is_untouched: [n] bool; whether the second moment has its first value.
    """

    rates: Tensor
    mean_states: Tensor
    is_untouched: Tensor


@dataclass(kw_only=True)
class CommonOptions:
    """What every sparse optimizer takes beside the options of its formula, in Python and in a configuration."""

    weight_decay: float = 0.0
    """L2 factor of the rows that a step touches, added to the gradient as `weight_decay * row`."""
    decoupled_weight_decay: bool = False
    """Take `lr * weight_decay * row` from the row instead, apart from the gradient."""
    maximize: bool = False
    """Go up the gradient, not down."""
    max_row_grad_norm: float | None = None
    """Scale the gradient of each row down to this norm. None does not clip."""
    max_norm: float | None = None
    """Scale each row down to this norm after a step that touches it. None leaves rows as they are."""
    max_grad_norm: float | None = None
    """Scale the summed gradients of all tables and ranks down to this global norm together, before
    `max_row_grad_norm`. None does not clip."""
    nonfinite: NonFinitePolicy = "error"
    """What happens if a gradient is not finite on any rank: "error" raises NonFiniteError on every rank, "skip" leaves
    the step out and counts it. Nothing is applied on any rank either way."""


OF_A_STEP = ("max_grad_norm", "nonfinite")
"""The common options that hold for all tables together; the others may differ from table to table."""

_OPTIONS = tuple(option.name for option in fields(CommonOptions))


class SparseOptimizer(StoreOptimizer):
    """Base of the optimizers of a collection; a subclass gives the formula, in `direction`.

    One parameter group per group of tables, so that torch's learning-rate schedulers work; its `tables` names
    them. `step` counts and hyperparameters live in `param_groups`, which `state_dict` returns; the rows' state
    lies beside the rows in the collection and is saved with them.

    Only rows that a step touched change, weight decay and moments included.

    Args:
        collection: the tables.
        defaults: hyperparameters of the subclass's formula; `lr` among them.
        states: what the formula keeps for each row.
        options: see `CommonOptions`.

    Attributes:
        num_skipped: steps left out.
        looks_later: whether `step` returns without waiting for the device. The device itself leaves out a step that is
            not finite, and the next `step`, or `settle`, does what the policy says. Unless set, it does for tables on a
            GPU.
        preconditioner: changes the gradients of a step that is applied, before the formula takes them; None for
            gradients as they are.
        found_inf: if `looks_later`, scalar float32 on the device: 1 if the last step is left out, else 0, as the
            optimizers of torch take it under this name. None before the first step.

    Raises:
        TypeError: an option that the optimizer does not have.
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
        """See the class."""
        return self.stores[0].device.type == "cuda" if self._looks_later is None else self._looks_later

    @looks_later.setter
    def looks_later(self, value: bool) -> None:
        self._looks_later = value

    @property
    def name(self) -> str:
        """The name in a checkpoint."""
        return type(self).__name__

    def direction(
        self, grad: Tensor, states: Mapping[str, Tensor], settings: dict[str, Any]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Returns what is taken, times the rate, from each touched row, and updates the rows' states in place.

        Everything else is done for it: rows are read and written, in bfloat16 too, and the options of
        `SparseOptimizer` applied.

        Args:
            grad: [n, dim] float32; summed over duplicates and ranks, scaled, clipped and decayed.
            states: by name [n] or [n, dim] float32; the touched rows' parts of `states`.
            settings: the parameter group; `step` counts this one.

        Returns:
            [n, dim], or its numerator and denominator, which divides last as in `torch.optim`.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no formula: define direction(grad, states, settings)")

    def leaves_out_rows(self, settings: dict[str, Any]) -> bool:
        """Returns whether `update` may be given rows outside the table on a GPU, which it leaves out."""
        return False

    def rate(self, settings: dict[str, Any]) -> float:
        """Returns the learning rate of a step."""
        return float(settings["lr"])

    def update(
        self, store: RowsToUpdate, gradient: RowGradient, settings: dict[str, Any], grad_factor: float | Tensor = 1.0
    ) -> None:
        """Applies the formula to the rows of a gradient times a factor; `settings` is the parameter group."""
        names = [state.name for state in self.states]

        def direction(grad: Tensor, touched: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
            return self.direction(grad, dict(zip(names, touched, strict=True)), settings)

        step = self.row_step(store, gradient, settings, grad_factor)
        states = [store.state[name] for name in names]
        row_update(store.weight, states, gradient.rows, gradient.values, step, direction)

    def row_step(
        self, store: RowsToUpdate, gradient: RowGradient, settings: dict[str, Any], grad_factor: float | Tensor
    ) -> RowStep:
        """Returns what the options make of a step."""
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
        """Returns the rate of each row of a store before a step: see `Touched.rates`. None if the formula has none."""
        return None

    def effective_rates(self, group: int, rows: slice) -> EffectiveRates | None:
        """Returns what is left of the learning rate for local rows of a group of tables; None without a divisor."""
        return None

    def reset_state(self) -> None:
        """Sets the states of all rows to their first values, and the count of steps to zero, as if just made.

        Collective: every rank.
        """
        self.settle()
        for store, settings in zip(self.stores, self.param_groups, strict=True):
            settings[STEP] = 0
            for state in self.states:
                store.fill_state(state.name, state.fill)

    def veto(self, reason: str) -> None:
        """Marks the coming step as not finite on this rank, for instance because its loss is not."""
        self._veto = reason

    def watch(self, values: Tensor, explain: Callable[[], str | None] | None = None) -> None:
        """Makes the coming step depend on numbers of this rank: if one is not finite, the step counts as not finite.

        Args:
            values: a loss, or any other tensor.
            explain: returns what is wrong with them, or None; needed unless they are a loss.
        """
        self._watched.append(Watched(values, explain or functools.partial(reason_of_loss, values)))

    @property
    def decided(self) -> torch.cuda.Event | None:
        """When the host can know whether the last step was applied; None if it knows already."""
        return None if self._pending is None else self._pending.arrived

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Collects the gradients that wait, agrees on them with all ranks, and applies them on all ranks or on none.

        Collective: every rank.

        Args:
            closure: called first; runs forward and backward and returns the loss, as torch's optimizers take it.

        Returns:
            What the closure returned; None without one.

        Raises:
            NonFiniteError: a gradient is not finite, or a rank vetoed, and the policy is "error".
            ValueError: a GradScaler called it.
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

    # Has a GradScaler call `step` at once, after it has set `grad_scale`, so that `step` can refuse it.
    _step_supports_amp_scaling = True

    # Torch wraps `step` of its optimizers to record each call and run hooks, unless told that this was done. The record
    # takes a tenth of a small step even if nobody reads it, so `step` goes that way only if somebody does.
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
        """Returns the gradients that wait at the owners of their rows, one per group of tables."""
        may_pad = looks_later and self.preconditioner is None  # which reads the state of every row
        gradients = [
            store.waiting_gradient(is_padded=may_pad and self.leaves_out_rows(settings))
            for store, settings in zip(self.stores, self.param_groups, strict=True)
        ]
        if looks_later:
            # Whoever has waited for the number of rows need not wait for the last step's verdict, which came before.
            for gradient in gradients:
                gradient.count_rows()
        return gradients

    def _apply(self, gradients: Sequence[RowGradient], factor: float | Tensor) -> None:
        """Updates weight and state of the touched rows in one pass."""
        for settings in self.param_groups:
            settings[STEP] += 1
        opened = [store.open_rows(gradient) for store, gradient in zip(self.stores, gradients, strict=True)]
        pieces: Iterable[Iterable[Opened]] = zip(opened, strict=True)
        if self.preconditioner is not None:
            pieces = preconditioned(self, self.preconditioner, gradients, opened)
        for store, parts, settings in zip(self.stores, pieces, self.param_groups, strict=True):
            for rows, gradient in parts:
                self.update(rows, gradient, settings, factor)
                increment_version(rows.weight)  # kernels write behind torch's back, which checks what backward reads
            store.close_rows()

    def settle(self) -> None:
        """Finds out whether the last step was applied, if `looks_later` put that off. Collective: every rank.

        Raises:
            NonFiniteError: it was not, and the policy is "error".
        """
        pending, self._pending = self._pending, None
        if pending is None or pending.is_finite():
            return
        for settings in self.param_groups:
            settings[STEP] -= 1
        self._handle_nonfinite(pending.gradients, pending.reason())

    def state_dict(self) -> dict[str, Any]:
        """See `StoreOptimizer.state_dict`. Settles the last step first."""
        self.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `StoreOptimizer.load_state_dict`. Settles the last step first, which else were counted down later."""
        self.settle()
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Returns what a copy is made of, which has no gradients that wait and no step to settle.

        Collective if a step is to settle, as `settle` is: every rank copies or pickles its optimizer then.
        """
        self.settle()
        return {**super().__getstate__(), "_watched": [], "_veto": None, "found_inf": None}

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients that wait."""
        for store in self.stores:
            store.clear_gradient()

    def _agree(self, gradients: Sequence[RowGradient]) -> float | None:
        """Returns what scales all gradients, or None to leave the step out, by finiteness and norm on all ranks.

        Collective: every rank.
        """
        device = gradients[0].device
        if device.type == "cuda":
            catch_up(device)
        reason, self._veto, self._watched = reason_of(self._veto, self._watched), None, []
        # The sum of squares is not finite if any gradient is not, so one number answers both questions. If nobody asks
        # for the norm, gradients need not be summed to know that they are finite.
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
        """Returns the factor for all gradients, which is on the device. Collective: every rank."""
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
            f"step {step}: {reasons[0]}; nothing of this step was applied on any rank. "
            "Lower the learning rate, clip gradients (max_grad_norm), or leave such steps out (nonfinite=skip)."
        )

    def _first_nonfinite(self, gradients: Sequence[RowGradient]) -> str | None:
        for store, gradient in zip(self.stores, gradients, strict=True):
            bad = (~gradient.values.isfinite()).any(dim=1).nonzero()
            if bad.numel():
                return f"the gradient of {store.describe(int(gradient.rows[bad[0, 0]]))} is not finite"
        return None


_NO_SCALER = (
    "an optimizer of tables takes no GradScaler, which scales and checks the gradients of parameters. Use autocast "
    "with bfloat16, which needs none. With float16, have the gradient divided on its way to the rows, "
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
    """Raises ValueError unless a decay lies in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
