"""The parts that a recipe gives to a run: the model, its optimizers, its data and its evaluation."""

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
    """Holds the loss of this rank's batch, for backward and for the log.

    Attributes:
        loss: scalar; `backward` is called on it. The gradients are averaged over the ranks.
        total: scalar float64, detached; the sum of the losses of all predictions in the batch.
        num_predictions: number of predictions. The logged loss is `total / num_predictions`, both summed over the
            ranks.
        sums: [n] float64 or None, detached; further sums, such as counts per bin, added up over steps and ranks.
            `Task.summarize` computes measures from them. The size n is the same in every step.
    """

    loss: Tensor
    total: Tensor
    num_predictions: int
    sums: Tensor | None = None


Model = Callable[[Any], Objective]


@runtime_checkable
class DivisibleBatch(Protocol):
    """A batch that can be split into micro-batches, which `train.accumulate_steps` requires."""

    def split(self, num_parts: int) -> Sequence[Any]:
        """Returns `num_parts` batches, some of which may be empty; their losses add up to the loss of this batch."""


class Batches(Protocol):
    """Returns batches as a function of epoch and step, so there is no state to save or restore."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps per epoch, the same on every rank; for growing batches, of an epoch with full batches."""

    @property
    def examples_per_epoch(self) -> int:
        """Number of examples per epoch over all ranks."""

    def batch(self, epoch: int, step: int) -> Any:
        """Returns this rank's batch of a step; it must have the attribute `num_examples`."""


@runtime_checkable
class GrowingBatches(Batches, Protocol):
    """Batches whose size may grow during the run, so that the first epochs have more steps than later ones."""

    @property
    def is_growing(self) -> bool:
        """Whether the batches grow; if not, every epoch has `steps_per_epoch` steps."""

    def steps_of(self, epoch: int) -> int:
        """Returns the number of steps of an epoch, the same on every rank."""

    def share_done(self, epoch: int, step: int) -> float:
        """Returns the fraction of the epoch's examples that come before a step."""


@runtime_checkable
class StreamedBatches(Protocol):
    """Returns batches of a stream, which is read once and whose length is unknown."""

    def next_batch(self, position: Mapping[str, Any]) -> tuple[Any | None, Mapping[str, Any], bool]:
        """Reads the next step from a position in the stream.

        Collective: every rank.

        Args:
            position: JSON; empty for the start of the stream.

        Returns:
            This rank's batch, the position of the next step, and whether the stream has ended. The batch is None if
            none arrived within about a second, or if the stream has ended.
        """


@dataclass(frozen=True)
class Evaluation:
    """Describes how and when a run is evaluated on held-out data.

    Attributes:
        measure: collective; returns the measures, the same on every rank. Its argument is a heartbeat function, which
            it must call now and then, so that the watchdog does not end the rank. It must not change anything that
            training uses. If it raises the same error on every rank, the run saves a checkpoint and continues.
        every_steps: steps between two evaluations; None evaluates by epochs only.
        every_epochs: epochs between two evaluations; None evaluates by steps only. The end of the run is always
            evaluated.
    """

    measure: Callable[[Callable[[], None]], Mapping[str, float]]
    every_steps: int | None = None
    every_epochs: int | None = 1

    def is_due(self, step: int, epochs_done: int | None, total_steps: int | None) -> bool:
        """Returns whether an evaluation is due, the same on every rank.

        Args:
            step: number of steps done.
            epochs_done: number of epochs done if the last step ended an epoch; otherwise, and for a stream, None.
            total_steps: number of steps of the run; None for a stream.
        """
        counted = ((step, self.every_steps), (epochs_done, self.every_epochs))
        is_at_period = any(done is not None and period is not None and done % period == 0 for done, period in counted)
        return step == total_steps or is_at_period


@dataclass(frozen=True)
class Task:
    """Holds what a run trains: model, tables, optimizers and data.

    Attributes:
        model: takes a batch and returns its objective.
        tables: the model's tables.
        optimizer: the optimizer of the tables.
        batches: the training data.
        dense: the optimizer of the model's dense parameters; None if it has none.
        evaluation: the evaluation during training; None for no evaluation.
        summarize: computes measures from the sums of `Objective.sums` over steps and ranks; None if there are no sums.
        unit: plural noun for the examples, used in metric names such as "examples_per_second".
        frequencies: by table, [num_rows]; how often each id occurs in the data. Tables may be left out.
        measures: names of the measures that `summarize` and `evaluation` return; None if they are not known in advance.
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
    """Names a file of vectors from another program that initialises a table.

    Attributes:
        path: path of the file.
        rows: returns the table's row for each name.
    """

    path: str
    rows: Callable[[], Mapping[str, int]]


@dataclass(frozen=True)
class Parts:
    """Holds everything that a recipe builds from a configuration and its data.

    Attributes:
        task: model, optimizers, data and evaluation.
        facts: JSON that is saved with each checkpoint. `data_fingerprint` identifies the data, so that a resumed run
            can check it. Readers of the vectors need others, such as `export_table`.
        write_files: called on rank 0; writes files to the run folder that readers of the vectors need, such as a
            vocabulary.
        pretrained: by table, the file of vectors that initialises it in a new run.
        unverified: prepared data whose checksums are not verified yet; the run verifies them while it trains.
    """

    task: Task
    facts: Mapping[str, Any]
    write_files: Callable[[RunFolder], None] = lambda folder: None
    pretrained: Mapping[str, Pretrained] = field(default_factory=dict)
    unverified: Unverified = ()
