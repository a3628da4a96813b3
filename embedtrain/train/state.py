"""Where a run is: all that a resumed run needs beside its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class TrainState:
    """Counters of a run. Every draw of the data is a function of (seed, epoch, step): no generator is saved.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        step_in_epoch: steps done of the current epoch.
        examples: examples that all ranks have trained on; words of the text for word vectors, before subsampling.
        seconds: wall time spent in training, and in waiting for a stream.
        stream: of a run over a stream, where its next step begins; see `StreamedBatches`.
    """

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0
    examples: int = 0
    seconds: float = 0.0
    stream: Mapping[str, Any] = field(default_factory=dict)

    def advance(self, steps_per_epoch: int) -> None:
        """Counts a step of an epoch."""
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch == steps_per_epoch:
            self.epoch += 1
            self.step_in_epoch = 0

    def advance_stream(self, position: Mapping[str, Any]) -> None:
        """Counts a step of a stream."""
        self.step += 1
        self.stream = position

    def as_json(self) -> dict[str, Any]:
        """Returns the counters by name."""
        return asdict(self)

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Takes over the counters that `as_json` returned."""
        for own in fields(self):
            setattr(self, own.name, saved[own.name])
