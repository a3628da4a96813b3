"""Where the gradients of a group of tables wait for their optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops.row_gradient import Delivery, RowGradient
from embedtrain.optim.registry import warn_once

_MOST_DELIVERIES = 16
"""So many deliveries wait as they are. More are summed by row, so that what waits is bounded by the rows touched.

On processors this changes no bit. A GPU sums the gradients of a row in chunks of 32, which sums made before shift: with
more deliveries it rounds otherwise than if all were summed at once.
"""


class GradientMailbox:
    """Gradients of local rows that backward delivered and no step has applied yet.

    Args:
        num_rows: rows of the group on this rank.
        dim: columns.
        device: of the gradients.
        num_ranks: ranks that share the tables.
        table_names: the tables.

    Attributes:
        anchor: an empty leaf. Rows are not leaves of the graph: this one makes autograd call a look-up's backward,
            which delivers their gradients. It requires no gradient if all rows are frozen.
        frozen: half-open ranges of local rows whose gradients are dropped, while other rows are trained.
        optimizer: refers to the optimizer that takes the gradients; None if none was made.
        was_applied: whether a step has applied what waits.
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
        """Adds the gradients that one backward left; they are not summed yet."""
        if self.frozen:
            delivery = self._without_frozen(delivery)
        if self.was_applied:
            self.was_applied = False
            warn_once(
                f"the gradients of an earlier step of the tables {', '.join(self._table_names)} are still there, and "
                "the next step applies them again: call optimizer.zero_grad() after each step. The zero_grad() of a "
                "module around the tables does not reach rows"
            )
        # One backward may come before there is an optimizer.
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
        # Sums are made again once what came since is more than they are: each gradient is summed twice on average.
        if len(self._deliveries) > _MOST_DELIVERIES and self._num_new >= self._num_summed:
            self._sum_up()

    def waiting(self) -> RowGradient:
        """Returns the gradient of the global mean loss as it was delivered.

        Losses are means over the local batch; the gradient of the mean over the global batch is the sum of what the
        ranks delivered divided by the world size, which happens here and nowhere else.
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
        """Forgets all gradients delivered."""
        self._deliveries = []
        self._num_summed, self._num_new = 0, 0
        self._waiting = None
        self.was_applied = False

    def take_over(self, earlier: GradientMailbox) -> None:
        """Takes over the gradients that wait in the mailbox of the same rows on another device, and its optimizer."""
        self.optimizer, self.was_applied = earlier.optimizer, earlier.was_applied
        if earlier._deliveries:
            summed = RowGradient(earlier._deliveries, num_rows=self._num_rows, dim=self._dim)
            device = self.anchor.device
            counts = None if summed.counts is None else summed.counts.to(device)
            self._deliveries = [Delivery.of_rows(summed.rows.to(device), summed.values.to(device), counts)]
            self._num_summed, self._num_new, self._waiting = summed.rows.numel(), 0, None

    def rows_and_values(self) -> tuple[Tensor, Tensor]:
        """Returns the touched rows [n] int64, unique and ascending, and [n, dim] float32, the gradient of each."""
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
