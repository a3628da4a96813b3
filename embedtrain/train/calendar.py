"""Converts between the steps of a run and the steps of its epochs."""

from __future__ import annotations

import bisect

from embedtrain.train.task import Batches, GrowingBatches


class Calendar:
    """Maps each step of a run to its epoch and back. With growing batches, epochs differ in their number of steps.

    Args:
        batches: the training data.
    """

    def __init__(self, batches: Batches) -> None:
        self._growing = batches if isinstance(batches, GrowingBatches) and batches.is_growing else None
        self._steps_per_epoch = batches.steps_per_epoch
        self._ends: list[int] = []
        """For growing batches: by epoch, the number of steps until its end, as far as it was computed."""

    def steps_of(self, epoch: int) -> int:
        """Returns the number of steps of an epoch."""
        return self._steps_per_epoch if self._growing is None else self._growing.steps_of(epoch)

    def first_step_of(self, epoch: int) -> int:
        """Returns the index of an epoch's first step in the run."""
        if self._growing is None:
            return epoch * self._steps_per_epoch
        while len(self._ends) < epoch:
            self._ends.append((self._ends[-1] if self._ends else 0) + self._growing.steps_of(len(self._ends)))
        return self._ends[epoch - 1] if epoch else 0

    def place_of(self, step: int) -> tuple[int, int]:
        """Returns the epoch of a step and the step's index in that epoch; all indices start at 0."""
        if self._growing is None:
            return divmod(step, self._steps_per_epoch)
        epoch = len(self._ends)
        while self.first_step_of(epoch) <= step:
            epoch += 1
        epoch = bisect.bisect_right(self._ends, step)
        return epoch, step - self.first_step_of(epoch)

    def share_done(self, step: int, epochs: int) -> float:
        """Returns the fraction of a run of `epochs` epochs that is done before a step.

        It counts steps, or examples if the batches grow.
        """
        if self._growing is None:
            return step / self.first_step_of(epochs)
        epoch, step_in_epoch = self.place_of(step)
        return (epoch + self._growing.share_done(epoch, step_in_epoch)) / epochs
