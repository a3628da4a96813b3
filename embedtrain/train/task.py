"""What a run trains: a model with its optimizers and data, its evaluation, and what is kept beside its tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from embedtrain.data.seal import Unverified
from embedtrain.embedding.collection import EmbeddingCollection
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.optim.optimizer import SparseOptimizer
from embedtrain.train.run_folder import RunFolder


@dataclass(frozen=True)
class Objective:
    """The loss of this rank's batch, to differentiate and to report.

    Attributes:
        loss: scalar; what backward is called on. Its gradient is averaged over the ranks.
        total: scalar float64, detached; the sum of the losses of all predictions of the batch.
        num_predictions: how many; `total / num_predictions`, both summed over the ranks, is the loss reported.
        sums: [n] float64 or None, detached; `Task.summarize` makes further measures of it, such as from counts in
            bins. It adds up over steps and ranks; its size is the same at every step.
    """

    loss: Tensor
    total: Tensor
    num_predictions: int
    sums: Tensor | None = None


Model = Callable[[Any], Objective]


@runtime_checkable
class DivisibleBatch(Protocol):
    """A batch that can be trained on in parts, one after the other, as `train.accumulate_steps` asks for."""

    def split(self, num_parts: int) -> Sequence[Any]:
        """Returns so many batches, of which some may be empty. Their losses add up to the loss of the whole batch."""


class Batches(Protocol):
    """Batches as functions of epoch and step: nothing to save, nothing to restore."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of every epoch, the same on every rank; of batches that grow, of an epoch of full ones."""

    @property
    def examples_per_epoch(self) -> int:
        """Examples of an epoch over all ranks."""

    def batch(self, epoch: int, step: int) -> Any:
        """Returns this rank's part of a step; it has `num_examples`."""


@runtime_checkable
class GrowingBatches(Batches, Protocol):
    """Batches that may grow from step to step, so that the first epochs have more steps than later ones."""

    @property
    def is_growing(self) -> bool:
        """Whether they do; if not, every epoch has `steps_per_epoch`."""

    def steps_of(self, epoch: int) -> int:
        """Returns the steps of an epoch, the same on every rank."""

    def share_done(self, epoch: int, step: int) -> float:
        """Returns the share of an epoch's examples that lie before a step of it."""


@runtime_checkable
class StreamedBatches(Protocol):
    """Batches of a stream, which comes once and whose end nobody knows."""

    def next_batch(self, position: Mapping[str, Any]) -> tuple[Any | None, Mapping[str, Any], bool]:
        """Reads the step that begins at a position.

        Collective: every rank.

        Args:
            position: JSON; empty for the beginning.

        Returns:
            This rank's part of the step, or None where it has not come within about a second or the stream is over;
            where the next step begins; and whether the stream is over.
        """


@dataclass(frozen=True)
class Evaluation:
    """A measurement on held-out data during training.

    Attributes:
        measure: collective; returns the measures, alike on every rank. It is given a function to call now and
            then, which says that this rank is getting on. It changes nothing that training depends on. If it raises, on
            every rank alike, the run is saved and goes on.
        every_steps: steps between two; None leaves it to the epochs.
        every_epochs: epochs between two; None leaves it to the steps. The end of the run is always measured.
    """

    measure: Callable[[Callable[[], None]], Mapping[str, float]]
    every_steps: int | None = None
    every_epochs: int | None = 1

    def is_due(self, step: int, epochs_done: int | None, total_steps: int | None) -> bool:
        """Returns whether to measure after so many steps; alike on every rank.

        Args:
            step: how many are done.
            epochs_done: how many epochs are, if the last step ended one; None else, and for a stream.
            total_steps: of the run; None for a stream.
        """
        counted = ((step, self.every_steps), (epochs_done, self.every_epochs))
        is_at_period = any(done is not None and period is not None and done % period == 0 for done, period in counted)
        return step == total_steps or is_at_period


@dataclass(frozen=True)
class Task:
    """What a run trains.

    Attributes:
        model: takes a batch, returns its objective.
        tables: the model's tables.
        optimizer: of the tables.
        batches: the data.
        dense: the optimizer of the model's other parameters; None where it has none.
        evaluation: how the model is measured during training; None for not at all.
        summarize: turns the sums of `Objective.sums` over steps and ranks into measures; None where there are none.
        unit: what the batches count, in the plural: names the counters among the metrics.
        frequencies: by table [num_rows], how often each id occurs in the data, where that is known.
        measures: the names of what `summarize` and `evaluation` return; None if that is known only when they have.
    """

    model: Model
    tables: EmbeddingCollection
    optimizer: SparseOptimizer
    batches: Batches | StreamedBatches
    dense: DenseOptimizer | None = None
    evaluation: Evaluation | None = None
    summarize: Callable[[Tensor], Mapping[str, float]] | None = None
    unit: str = "examples"
    frequencies: Mapping[str, Tensor] = field(default_factory=dict)
    measures: Sequence[str] | None = None


@dataclass(frozen=True)
class Pretrained:
    """Vectors of another program that a table starts from.

    Attributes:
        path: the file.
        rows: returns the row of each name.
    """

    path: str
    rows: Callable[[], Mapping[str, int]]


@dataclass(frozen=True)
class Parts:
    """What a model's configuration and data were turned into.

    Attributes:
        task: model, optimizers, data and evaluation.
        facts: JSON for each checkpoint: `data_fingerprint`, by which a resumed run recognises its data, and what
            readers of the vectors need, such as `export_table`.
        write_files: called on rank 0; writes to the run folder what readers of the vectors need, such as a vocabulary.
        pretrained: by table, the vectors that it starts from in a new run.
        unverified: the prepared data that were not compared with their checksums; the run does so while it trains.
    """

    task: Task
    facts: Mapping[str, Any]
    write_files: Callable[[RunFolder], None] = lambda folder: None
    pretrained: Mapping[str, Pretrained] = field(default_factory=dict)
    unverified: Unverified = ()
