"""The mailbox in which the gradients of a table group wait for the optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.distributed.ranks import Ranks
from embedtrain.ops.row_gradient import Delivery, RowGradient
from embedtrain.optim.registry import warn_once

_MOST_DELIVERIES = 16
"""Number of deliveries up to which they are kept separately. More deliveries are summed by row, so that memory is
bounded by the number of touched rows.

On CPUs the result is equal to the bit. A GPU sums the gradients of a row in chunks of 32, and earlier sums shift the
chunks: with more deliveries its rounding differs from a single sum.
"""


class GradientMailbox:
    """Holds gradients of local rows that backward has delivered and no step has cleared yet.

    Args:
        num_rows: number of the group's rows on this rank.
        dim: length of the vectors.
        device: device of the gradients.
        num_ranks: number of ranks that share the tables.
        table_names: names of the tables.

    Attributes:
        anchor: an empty leaf tensor. Rows are not leaves of the autograd graph, so every look-up takes this leaf as an
            input: then autograd calls its backward. It requires no gradient if all rows are frozen.
        frozen: half-open ranges of local rows whose gradients are dropped.
        optimizer: weak reference to the optimizer that applies the gradients; None before there is an optimizer.
        was_applied: whether a step has already applied the gradients.
    """

    def __init__(
        self, num_rows: int, dim: int, device: torch.device, num_ranks: int, table_names: Sequence[str]
    ) -> None:
        self.optimizer: weakref.ref[object] | None = None
        self.was_applied = False
        self._table_names = table_names
        self.anchor = torch.empty(0, device=device, requires_grad=True)
        self.frozen: Sequence[tuple[int, int]] = ()
        self._num_rows, self._dim, self._num_ranks = num_rows, dim, num_ranks
        self._deliveries: list[Delivery] = []
        self._num_summed, self._num_new = 0, 0
        self._has_delivered = False
        self._waiting: RowGradient | None = None

    def deliver(self, delivery: Delivery) -> None:
        """Adds the gradients of one backward, without summing them by row."""
        if self.frozen:
            delivery = self._without_frozen(delivery)
        if self.was_applied:
            self.was_applied = False
            warn_once(
                f"the gradients of an earlier step of the tables {', '.join(self._table_names)} are still there, and "
                "the next step applies them again: call optimizer.zero_grad() after each step. The zero_grad() of a "
                "module around the tables does not reach rows"
            )
        # The first backward may run before the optimizer is created, so the warning begins with the second.
        if self._has_delivered and (self.optimizer is None or self.optimizer() is None):
            warn_once(
                f"the tables {', '.join(self._table_names)} get gradients that no optimizer takes: make an optimizer "
                "of them, or freeze them by requires_grad_(False), which saves the work. A copy of tables is not "
                "trained by the optimizer of the original: copy both, copy.deepcopy((tables, optimizer))"
            )
        self._has_delivered = True
        self._deliveries.append(delivery)
        self._waiting = None
        self._num_new += delivery.rows.numel()
        # Summing again only after as many new gradients as sums keeps the cost at two sums per gradient on average.
        if len(self._deliveries) > _MOST_DELIVERIES and self._num_new >= self._num_summed:
            self._sum_up()

    def keep(self, ranks: Ranks) -> None:
        """Copies waiting gradients that lie in memory which `Ranks.all_to_all_split` overwrites."""
        for delivery in self._deliveries:
            kept = ranks.kept(delivery.grads)
            if any(new is not old for new, old in zip(kept, delivery.grads, strict=True)):
                delivery.replace(kept)
                self._waiting = None

    def waiting(self) -> RowGradient:
        """Returns the gradient of the mean loss over the global batch.

        Each rank's loss is a mean over its local batch. So the gradient of the global mean is the sum of the ranks'
        gradients divided by the world size. The division happens only here.
        """
        if self._waiting is None:
            if self._deliveries:
                factor = 1.0 / self._num_ranks
                self._waiting = RowGradient(self._deliveries, num_rows=self._num_rows, dim=self._dim, factor=factor)
            else:
                no_rows = torch.zeros(0, dtype=torch.int64, device=self.anchor.device)
                no_values = torch.zeros(0, self._dim, dtype=torch.float32, device=self.anchor.device)
                none = Delivery.of_rows(no_rows, no_values, no_values.new_zeros(0))
                self._waiting = RowGradient([none], num_rows=self._num_rows, dim=self._dim)
        return self._waiting

    def clear(self) -> None:
        """Removes all delivered gradients."""
        self._deliveries = []
        self._num_summed, self._num_new = 0, 0
        self._waiting = None
        self.was_applied = False

    def take_over(self, earlier: GradientMailbox) -> None:
        """Takes over gradients and optimizer from the mailbox of the same rows on another device."""
        self.optimizer, self.was_applied = earlier.optimizer, earlier.was_applied
        if earlier._deliveries:
            summed = RowGradient(earlier._deliveries, num_rows=self._num_rows, dim=self._dim)
            device = self.anchor.device
            counts = None if summed.counts is None else summed.counts.to(device)
            self._deliveries = [Delivery.of_rows(summed.rows.to(device), summed.values.to(device), counts)]
            self._num_summed, self._num_new, self._waiting = summed.rows.numel(), 0, None

    def rows_and_values(self) -> tuple[Tensor, Tensor]:
        """Returns the touched rows, [n] int64 unique and ascending, and their gradients, [n, dim] float32."""
        waiting = self.waiting()
        return waiting.rows, waiting.values

    def _sum_up(self) -> None:
        summed = RowGradient(self._deliveries, num_rows=self._num_rows, dim=self._dim)
        self._deliveries = [Delivery.of_rows(summed.rows, summed.values, summed.counts)]
        self._num_summed, self._num_new = summed.rows.numel(), 0

    def _without_frozen(self, delivery: Delivery) -> Delivery:
        summed = RowGradient([delivery], num_rows=self._num_rows, dim=self._dim)
        is_kept = torch.ones_like(summed.rows, dtype=torch.bool)
        for start, stop in self.frozen:
            is_kept &= (summed.rows < start) | (summed.rows >= stop)
        counts = None if summed.counts is None else summed.counts[is_kept]
        return Delivery.of_rows(summed.rows[is_kept], summed.values[is_kept], counts)
