"""What every sparse optimizer shares: the agreement of the ranks before anything is applied."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from embedtrain.distributed.collectives import all_gather_object, all_reduce_sum
from embedtrain.distributed.runtime import rank_of
from embedtrain.distributed.shared_memory import SharedMemoryExchange
from embedtrain.errors import NonFiniteError

NonFinitePolicy = Literal["error", "skip"]


class RowStore(Protocol):
    """Rows with their state and the gradients that wait for them: an optimizer's view of a group of tables."""

    weight: Tensor
    state: dict[str, Tensor]
    shared: SharedMemoryExchange | None

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the rows; None for one process."""

    def allocate_state(self, name: str, fill: float) -> Tensor:
        """Gives every row one float32 of state."""

    def gradient(self) -> tuple[Tensor, Tensor]:
        """Returns the touched rows, unique, and their summed gradients."""

    def before_update(self, rows: Tensor) -> None:
        """Takes note that the rows are about to change."""

    def clear_gradient(self) -> None:
        """Forgets the gradients."""

    def describe(self, row: int) -> str:
        """Names the table and the id of a row."""

    def rounding_keys(self, rows: Tensor, step: int) -> Tensor | None:
        """Returns keys for stochastic rounding, or None for float32 rows."""


class HasRowGroups(Protocol):
    """A collection of tables."""

    @property
    def row_groups(self) -> Sequence[RowStore]:
        """The groups of tables, in the same order on every rank."""


class SparseOptimizer(torch.optim.Optimizer):
    """Base of the optimizers of a collection; a subclass gives the formula.

    One parameter group per group of tables, so that torch's learning-rate schedulers work. `step` counts
    and hyperparameters live in `param_groups`, which `state_dict` returns; the rows' state lies beside the
    rows in the collection and is saved with them.

    Args:
        collection: the tables.
        defaults: hyperparameters of the subclass's formula.
        max_grad_norm: the largest global norm, over all tables and ranks, of the summed gradient; larger
            gradients are scaled down to it. None does not clip.
        nonfinite: what to do when a gradient is not finite on any rank: "error" raises NonFiniteError on
            every rank, "skip" leaves the step out and counts it in `num_skipped`. Nothing is applied on any
            rank either way.
    """

    def __init__(
        self,
        collection: HasRowGroups,
        defaults: dict[str, Any],
        *,
        max_grad_norm: float | None = None,
        nonfinite: NonFinitePolicy = "error",
    ) -> None:
        if max_grad_norm is not None and not 0 < max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm must be positive, got {max_grad_norm}")
        if nonfinite not in ("error", "skip"):
            raise ValueError(f"nonfinite must be 'error' or 'skip', got {nonfinite!r}")
        self._stores = list(collection.row_groups)
        self._max_grad_norm = max_grad_norm
        self._nonfinite = nonfinite
        self._veto: str | None = None
        self.num_skipped = 0
        super().__init__([{"params": [store.weight], "step": 0} for store in self._stores], defaults)

    @abstractmethod
    def update(self, store: RowStore, rows: Tensor, grad: Tensor, settings: dict[str, Any]) -> None:
        """Applies the formula to rows [n] with gradients [n, dim]; `settings` is the parameter group."""

    def veto(self, reason: str) -> None:
        """Marks the coming step as not finite on this rank, for instance because its loss is not."""
        self._veto = reason

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Applies the gradients that wait, on all ranks or on none.

        Collective: every rank.

        Raises:
            NonFiniteError: a gradient is not finite, or a rank vetoed, and the policy is "error".
        """
        if closure is not None:
            raise ValueError("sparse optimizers take no closure: run backward, then step()")
        gradients = [store.gradient() for store in self._stores]
        scale = self._agree(gradients)
        if scale is None:
            return
        for store, (rows, grad), settings in zip(self._stores, gradients, self.param_groups, strict=True):
            settings["step"] += 1
            store.before_update(rows)
            self.update(store, rows, grad if scale == 1.0 else grad * scale, settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients that wait."""
        for store in self._stores:
            store.clear_gradient()

    def _agree(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> float | None:
        """Returns the factor for all gradients, or None to leave the step out. Collective: every rank."""
        # The sum of squares is not finite where any gradient is not, so one number serves both questions.
        total = math.nan if self._veto is not None else sum(_sum_of_squares(grad) for _, grad in gradients)
        process_group = self._stores[0].process_group
        if process_group is not None:
            squares = torch.tensor(total, dtype=torch.float64, device=gradients[0][1].device)
            total = float(all_reduce_sum(squares, process_group, self._stores[0].shared))
        if not math.isfinite(total):
            self._handle_nonfinite(gradients)
            return None
        norm = math.sqrt(total)
        if self._max_grad_norm is None or norm <= self._max_grad_norm:
            return 1.0
        return self._max_grad_norm / norm

    def _handle_nonfinite(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        veto, self._veto = self._veto, None
        self.num_skipped += 1
        if self._nonfinite == "skip":
            return
        found = veto or self._first_nonfinite(gradients)
        if found is not None:
            found = f"{found}, on rank {rank_of(self._stores[0].process_group)}"
        reasons = [reason for reason in all_gather_object(found, self._stores[0].process_group) if reason is not None]
        step = self.param_groups[0]["step"] + 1
        raise NonFiniteError(
            f"step {step}: {reasons[0]}; nothing of this step was applied on any rank. "
            "Lower the learning rate, clip gradients (max_grad_norm), or leave such steps out (nonfinite=skip)."
        )

    def _first_nonfinite(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> str | None:
        for store, (rows, grad) in zip(self._stores, gradients, strict=True):
            bad = (~grad.isfinite()).any(dim=1).nonzero()
            if bad.numel():
                first = bad[0, 0]
                return f"the gradient of {store.describe(int(rows[first]))} is not finite"
        return None


def _sum_of_squares(grad: Tensor) -> float:
    flat = grad.flatten()
    squares = float(torch.dot(flat, flat))
    # Large but finite float32 values overflow the quick sum; float64 holds any of them.
    return squares if math.isfinite(squares) else float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2
