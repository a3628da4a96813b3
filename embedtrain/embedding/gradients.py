"""Where the gradients of a group of tables wait for their optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops.row_gradient import Delivery, RowGradient


class GradientMailbox:
    """Gradients of local rows that backward delivered and no step has applied yet.

    Args:
        num_rows: rows of the group on this rank.
        dim: columns.
        device: of the gradients.
        num_ranks: ranks that share the tables.

    Attributes:
        anchor: an empty leaf. Rows are not leaves of the graph: this one makes autograd call a look-up's backward,
            which delivers their gradients.
    """

    def __init__(self, num_rows: int, dim: int, device: torch.device, num_ranks: int) -> None:
        self.anchor = torch.empty(0, device=device, requires_grad=True)
        self._num_rows, self._dim, self._num_ranks = num_rows, dim, num_ranks
        self._deliveries: list[Delivery] = []
        self._waiting: RowGradient | None = None

    def deliver(self, delivery: Delivery) -> None:
        """Adds the gradients that one backward left; they are not summed yet."""
        self._deliveries.append(delivery)
        self._waiting = None

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
                no_values = torch.zeros(0, self._dim, device=self.anchor.device)
                self._waiting = RowGradient.of_rows(no_rows, no_values, self._num_rows)
        return self._waiting

    def clear(self) -> None:
        """Forgets all gradients delivered."""
        self._deliveries = []
        self._waiting = None

    def rows_and_values(self) -> tuple[Tensor, Tensor]:
        """Returns the touched rows [n] int64, unique and ascending, and [n, dim] float32, the gradient of each."""
        waiting = self.waiting()
        return waiting.rows, waiting.values
