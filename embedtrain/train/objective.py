"""What a model returns for a batch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """The loss of this rank's batch, to differentiate and to report.

    Attributes:
        loss: scalar; what backward is called on. Its gradient is averaged over the ranks.
        total: scalar float64, detached; the sum of the losses of all predictions of the batch.
        num_predictions: how many; `total / num_predictions`, both summed over the ranks, is the loss reported.
        sums: [n] float64 or None, detached; what further measures are made of by `Task.summarize`, such as counts
            in bins. It adds up over steps and ranks; its size is the same at every step.
    """

    loss: Tensor
    total: Tensor
    num_predictions: int
    sums: Tensor | None = None
