"""The state of a run that its checkpoints hold in addition to the tensors."""

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
    """Holds the sums since the last log record, so that a resumed run logs the same records as an uninterrupted one.

    Attributes:
        logged_step: step of the last training record.
        measured_step: step of the last evaluation.
        sums: sums over the steps since the last record and over all ranks; None for a sum that is not finite.
        seconds: training time of these steps.
    """

    logged_step: Count = 0
    measured_step: Count = 0
    sums: tuple[Number | None, ...] = ()
    seconds: Amount = 0.0


@dataclass
class BestSoFar:
    """Holds the best value so far of the metric that selects checkpoints.

    Attributes:
        metric: name of the metric.
        value: the best value.
        step: step at which it was measured.
        mark: the value of the last improvement by more than `BestPolicy.min_delta`.
        num_since: number of measurements since that improvement.
        kept: the best values, best first. As many as the run keeps best checkpoints, but at least one.
    """

    metric: str
    value: Number
    step: Count
    mark: Number
    num_since: Count = 0
    kept: tuple[Number, ...] = ()


@dataclass
class TrainState:
    """Holds the counters of a run. Random draws depend only on (seed, epoch, step), so no generator state is saved.

    Attributes:
        step: optimizer steps done.
        epoch: epochs done.
        step_in_epoch: steps done in the current epoch.
        examples: examples that all ranks have trained on. For word vectors, words of the text before subsampling.
        seconds: wall time of training, and of waiting for a stream.
        stream: position in the stream where the next step begins; see `StreamedBatches`. Empty without a stream.
        window: sums that are not logged yet.
        best: the best measurement so far; None if the run does not track it.
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
        """Counts one step of an epoch."""
        self.step += 1
        self.step_in_epoch += 1
        if self.step_in_epoch == steps_per_epoch:
            self.epoch += 1
            self.step_in_epoch = 0

    def advance_stream(self, position: Mapping[str, Any]) -> None:
        """Counts one step of a stream and stores the position of the next."""
        self.step += 1
        self.stream = position

    def as_json(self) -> dict[str, Any]:
        """Returns the counters by name."""
        counters = asdict(self)
        return counters if self.best is not None else {name: counters[name] for name in counters if name != "best"}

    def restore(self, saved: TrainState) -> None:
        """Copies the counters of a checkpoint into this object."""
        for own in fields(self):
            setattr(self, own.name, getattr(saved, own.name))


@dataclass(frozen=True)
class _Group:
    """Declares the settings of a parameter group that this package reads; an optimizer may save others too."""

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
    """Holds the optimizer of the tables: the settings of each parameter group, and the number of skipped steps."""

    name: str
    param_groups: Annotated[tuple[Group, ...], Field(min_length=1)]
    num_skipped: Count


@dataclass(frozen=True)
class SavedDense:
    """Holds the name of the dense optimizer."""

    name: str


@dataclass(frozen=True)
class SavedPooling:
    """Holds where the bags of each feature are pooled; see `EmbeddingCollection.pooling_choices`."""

    num_ranks: Count
    features: Mapping[str, tuple[bool, Amount]]


@dataclass(frozen=True)
class Started:
    """Records that a table was initialised from a file of vectors."""

    path: str
    num_copied: Count
    num_rows: Count


@dataclass(frozen=True)
class GrownFrom:
    """Names the run and the step that a run was grown from."""

    path: str
    step: Count


@dataclass(frozen=True, kw_only=True)
class RunState(TableFacts):
    """Holds what the trainer saves in addition to the tensors. Checkpoints are validated against the annotations.

    Attributes:
        train: the counters.
        optimizer: the optimizer of the tables.
        data_fingerprint: identifies the training data.
        dense_optimizer: the optimizer of the dense parameters; None if the model has none.
        pooling: where bags are pooled; None in checkpoints of earlier versions, after which the run decides again.
        metrics: the latest value of each measure.
        measured_at: by measure, the step of its latest value; empty in checkpoints of earlier versions.
        init_from: by table, the file that it was initialised from.
        grown_from: the run that this run was grown from; None if there is none.
    """

    train: TrainState
    optimizer: SavedOptimizer
    data_fingerprint: str
    dense_optimizer: SavedDense | None = None
    pooling: SavedPooling | None = None
    metrics: Mapping[str, float | int | str] = field(default_factory=dict)
    measured_at: Mapping[str, Count] = field(default_factory=dict)
    init_from: Mapping[str, Started] = field(default_factory=dict)
    grown_from: GrownFrom | None = None


def read_run_state(manifest: Manifest, path: str) -> RunState:
    """Returns the state in the manifest of a run's checkpoint at `path`.

    Raises:
        CorruptCheckpointError: the state does not match the schema. The message names the key, its value and the
            expected value.
    """
    url = storage.join(path, MANIFEST_NAME)
    try:
        state = parse(RunState, dict(manifest.state))
    except SchemaError as error:
        raise CorruptCheckpointError(f"{url}: this is not the state of a run: {error}") from error
    if state.train.step != manifest.step:
        raise CorruptCheckpointError(f"{url}: step {manifest.step} holds the counters of step {state.train.step}")
    return state
