"""Where a run is, and all else that its checkpoints hold beside the tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from embedtrain import storage
from embedtrain.checkpoint import Manifest
from embedtrain.checkpoint.manifest import MANIFEST_NAME
from embedtrain.data.row_names import TableFacts
from embedtrain.errors import CorruptCheckpointError
from embedtrain.schema import Amount, Count, Number, SchemaError, parse


@dataclass(frozen=True)
class LogWindow:
    """What is trained and not yet logged, so that a resumed run logs the lines of one that never stopped.

    Attributes:
        logged_step: the step of the last record of the training.
        measured_step: the step of the last measurement on held-out data.
        sums: over the steps since the last record and over all ranks; None for a sum that is not finite.
        seconds: spent on these steps.
    """

    logged_step: Count = 0
    measured_step: Count = 0
    sums: tuple[Number | None, ...] = ()
    seconds: Amount = 0.0


@dataclass
class BestSoFar:
    """The best value of the metric that a run is followed by.

    Attributes:
        metric: its name.
        value: the best value.
        step: when it was measured.
        mark: the value of the last improvement that counted; see `BestPolicy.min_delta`.
        num_since: measurements since then.
    """

    metric: str
    value: Number
    step: Count
    mark: Number
    num_since: Count = 0


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
        window: what is not yet logged.
        best: the best measurement so far; None if nobody follows it.
    """

    step: Count = 0
    epoch: Count = 0
    step_in_epoch: Count = 0
    examples: Count = 0
    seconds: Amount = 0.0
    stream: Mapping[str, Any] = field(default_factory=dict)
    window: LogWindow | None = None
    best: BestSoFar | None = None

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
        counters = asdict(self)
        return counters if self.best is not None else {name: counters[name] for name in counters if name != "best"}

    def restore(self, saved: TrainState) -> None:
        """Takes over the counters of a checkpoint."""
        for own in fields(self):
            setattr(self, own.name, getattr(saved, own.name))


@dataclass(frozen=True)
class _Group:
    """The settings of a group of tables on which anything depends; an optimizer may save more."""

    step: Count
    tables: tuple[str, ...] = ()
    lr: Number | None = None
    initial_accumulator_value: Number | None = None


def _checked_group(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    parse(_Group, dict(settings))
    return settings


Group = Annotated[Mapping[str, Any], AfterValidator(_checked_group)]


@dataclass(frozen=True)
class SavedOptimizer:
    """The optimizer of the tables: the settings of each group of tables, the steps left out."""

    name: str
    param_groups: Annotated[tuple[Group, ...], Field(min_length=1)]
    num_skipped: Count


@dataclass(frozen=True)
class SavedDense:
    """The optimizer of the dense parameters."""

    name: str


@dataclass(frozen=True)
class SavedPooling:
    """Where the ranks pool the bags of each feature; see `EmbeddingCollection.pooling_choices`."""

    num_ranks: Count
    features: Mapping[str, tuple[bool, Amount]]


@dataclass(frozen=True)
class Started:
    """How a table began from a file of vectors."""

    path: str
    num_copied: Count
    num_rows: Count


@dataclass(frozen=True)
class GrownFrom:
    """The run and the step that a run was grown from."""

    path: str
    step: Count


@dataclass(frozen=True, kw_only=True)
class RunState(TableFacts):
    """What the trainer saves beside the tensors; the annotations are the schema that a checkpoint is checked against.

    Attributes:
        train: the counters.
        optimizer: of the tables.
        data_fingerprint: by which a resumed run recognises its data.
        dense_optimizer: of the dense parameters; None if the model has none.
        pooling: where bags are pooled; None in checkpoints of before it was decided once: the run decides anew.
        metrics: the newest value of each measure.
        init_from: by table, how it began from a file.
        grown_from: None if the run was not grown from another.
    """

    train: TrainState
    optimizer: SavedOptimizer
    data_fingerprint: str
    dense_optimizer: SavedDense | None = None
    pooling: SavedPooling | None = None
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    init_from: Mapping[str, Started] = field(default_factory=dict)
    grown_from: GrownFrom | None = None


def read_run_state(manifest: Manifest, path: str) -> RunState:
    """Returns the state in the manifest of a run's checkpoint at `path`.

    Raises:
        CorruptCheckpointError: it is not what the trainer saves; names the key, what it holds and what is allowed.
    """
    url = storage.join(path, MANIFEST_NAME)
    try:
        state = parse(RunState, dict(manifest.state))
    except SchemaError as error:
        raise CorruptCheckpointError(f"{url}: the state is not that of a run: {error}") from error
    if state.train.step != manifest.step:
        raise CorruptCheckpointError(f"{url}: step {manifest.step} holds the counters of step {state.train.step}")
    return state
