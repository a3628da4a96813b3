"""The sections of a configuration that all models share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal

from embedtrain.checkpoint.retention import Retention, num_best
from embedtrain.config.optimizer import DenseOptimizerConfig, OptimizerConfig, section
from embedtrain.data.stream import STANDARD_INPUT
from embedtrain.errors import UserError

_MAX_SECONDS = 1e8
"""Three years."""

MAX_COUNT = 1 << 40
"""The largest number of steps, rows or examples that a setting may ask for; tables have no more rows."""

MAX_WIDTH = 1 << 20
"""The largest size of a layer, window or list."""

_MAX_FLOAT = 3.4e38
"""Larger numbers are infinite in float32."""


@dataclass
class RunConfig:
    """Settings of the run itself."""

    path: str = "runs/default"
    """Run folder, any fsspec URL; the same command resumes the run in it."""
    device: str = "auto"
    """auto (one GPU per rank if the host has GPUs, else cpu), cpu or cuda."""
    timeout_seconds: float = 600.0
    """Timeout of collectives: seconds to wait for a rank before the run fails."""


@dataclass
class TableConfig:
    """Settings of the model's tables."""

    dim: int = 100
    """Length of the vectors."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which rows are stored."""
    wire_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of vectors and gradients sent between ranks; null: table.dtype for vectors, float32 for gradients."""
    placement: Literal["device", "host", "auto"] = "device"
    """Where rows and optimizer state are stored; auto uses host memory if they do not fit into GPU memory."""
    cache_bytes: int | None = None
    """GPU memory, in bytes, for copies of hot rows if rows are stored on the host; null for half of the free memory."""

    def check(self) -> None:
        """Checks what types cannot say."""
        if self.cache_bytes is not None and (self.cache_bytes < 0 or self.placement == "device"):
            raise UserError(
                f"table.cache_bytes must be at least 0 and needs table.placement=host or auto, got "
                f"{self.cache_bytes} and {self.placement}"
            )


@dataclass
class RowFilesConfig:
    """Format of files of rows."""

    format: str = "auto"
    """csv, tsv, jsonl and parquet have columns; lines has none; auto chooses by the suffix of each file."""
    columns: list[str] | None = None
    """Names of the columns of csv and tsv, in order; null if each file's first line names them."""
    delimiter: str | None = None
    """Delimiter of csv; null for a comma."""
    quote: str | None = "auto"
    """Quote character of csv and tsv; null for none; auto: " in csv, none in tsv."""


def file_keys(*sections: str) -> list[str]:
    """Returns the keys of sections of `RowFilesConfig` that may change if the content of their files stays the same."""
    return [f"{section}.{name}" for section in sections for name in ("path", "columns", "delimiter", "quote")]


@dataclass
class EarlyStopConfig:
    """Early stopping: end before the last epoch when checkpoint.best_metric stops improving."""

    patience: int | None = None
    """Stop after this number of consecutive measurements without improvement; null never stops early. The best
    checkpoint is kept."""
    min_delta: float = 0.0
    """Minimum difference from the best measurement that counts as an improvement."""


@dataclass
class TrainConfig:
    """Settings of the training loop."""

    epochs: int = 5
    """Passes over the data. A run resumed with more epochs continues; the schedule then spans all of them."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Precision of matrix products in dense layers and retrieval scores. bfloat16 runs forward passes under
    torch.autocast; parameters, optimizers and table rows keep their dtypes."""
    tf32: bool = False
    """Whether GPUs use TF32 for float32 matrix products of dense layers and retrieval scores."""
    accumulate_steps: int = 1
    """Number of micro-batches per step (gradient accumulation): each rank trains on its part of a step in this number
    of pieces, then updates once. The result equals the undivided step up to rounding. Memory holds the vectors and
    activations of one micro-batch at a time."""
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)


@dataclass
class ScheduleConfig:
    """The learning rate schedule."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"
    """Decay of the learning rate: none (constant), linear to zero, along half a cosine to zero, or with the inverse
    square root of the step."""
    warmup: float = 0.0
    """Warm-up: share of the run over which the rate first rises to its base."""
    min_factor: float = 1e-4
    """Lower bound of the rate, as a factor of its base."""
    epochs: int | None = None
    """Number of epochs over which the rate decays; null for train.epochs. May be larger than train.epochs."""


@dataclass
class EvaluateConfig:
    """When to measure on held-out data during training; the end of the run is always measured."""

    every_epochs: int | None = 1
    """Epochs between two measurements; null to use every_steps only."""
    every_steps: int | None = None
    """Steps between two measurements; null to use every_epochs only."""


@dataclass
class CheckpointConfig:
    """When to save and which checkpoints to keep; the end of the run is always saved."""

    every_steps: int | None = None
    """Steps between two saves; null to use every_seconds only."""
    every_seconds: float | None = 600.0
    """Seconds between two saves, by rank 0's clock; null to use every_steps only."""
    mode: Literal["async", "sync"] = "async"
    """async writes in the background while training continues; sync blocks training during a save."""
    max_extra_memory_bytes: int | None = 2**30
    """Maximum memory per rank for copies of rows that change during a background save; null for no limit."""
    max_failures: int = 3
    """Number of consecutive failed saves that only log a warning; one more fails the run."""
    full_every: int = 1
    """Every `full_every`-th save is full; the others hold only changed rows."""
    keep_last: int | None = 3
    """Number of newest checkpoints to keep. If keep_last, keep_every and keep_best are null, all are kept."""
    keep_every: int | None = None
    """Keep checkpoints whose step is a multiple of this."""
    keep_best: int | None = None
    """Number of best checkpoints by best_metric to keep. After a measurement that is among the best, a checkpoint is
    saved at once."""
    best_metric: str = Retention.best_metric
    """Metric by which checkpoints are compared, a name in metrics.jsonl. The value of a checkpoint is the last one that
    was logged before its save."""
    best_mode: Literal["auto", "min", "max"] = Retention.best_mode
    """Whether small or large values of best_metric are better; auto knows embedtrain's own metrics."""


@dataclass
class ResumeConfig:
    """How a run resumes from its newest checkpoint."""

    on_corrupt: Literal["error", "fallback"] = "error"
    """If the newest checkpoint is damaged, error stops; fallback resumes from the newest undamaged checkpoint and
    deletes newer ones."""
    convert_dtype: bool = False
    """Whether table.dtype may differ from the checkpoint's."""
    optimizer_state: Literal["require", "reset"] = "require"
    """require loads the optimizer state; reset starts with the initial state."""
    tables: list[str] | None = None
    """Load only these tables; the others start with initial values. null loads all."""


@dataclass
class LogConfig:
    """What is logged, and where."""

    every_steps: int = 50
    """Steps between two records of loss, speed and other metrics."""
    tensorboard: bool = True
    """Whether to write TensorBoard scalars to the run folder, if it is local."""
    wandb: str | None = None
    """Weights & Biases project to log to; null for none."""
    mlflow: str | None = None
    """MLflow experiment to log to; null for none."""
    rows_every_steps: int | None = 1000
    """Steps between two TensorBoard records of the rows' effective learning rates and optimizer state."""


@dataclass
class PublishConfig:
    """Publication during training."""

    to: str | None = None
    """Destination of the changed rows: a folder or Redis URL, as in `embedtrain publish --to`; null for none."""
    every_seconds: float = 600.0
    """Minimum seconds between two publications of a newer checkpoint (the best one if the run keeps its best); the end
    of the run is always published."""
    timeout_seconds: float = 3600.0
    """Timeout of a publication in seconds; a longer publication is stopped with a warning."""


@dataclass
class Config:
    """The configuration of a run; each model adds its own sections."""

    model: str = "???"
    """Name of the model: word2vec, retrieval, ranking, sasrec, or a model of another installed package."""
    seed: int = 1
    """Seed of all random draws: initial values, the order of the data, negatives."""
    start_from: str | None = None
    """Run folder of a trained run whose rows, optimizer state and dense part this run starts with; null for none."""
    start_from_grow: bool = False
    """With start_from: whether new words, ids or values in the data get rows; otherwise they count as unknown."""
    run: RunConfig = field(default_factory=RunConfig)
    table: TableConfig = field(default_factory=TableConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: section("rowwise_adagrad"))
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    log: LogConfig = field(default_factory=LogConfig)
    publish: PublishConfig = field(default_factory=PublishConfig)

    MEANT: ClassVar[Mapping[str, str]] = {
        "learning_rate": "optimizer.lr",
        "alpha": "optimizer.lr",
        "iter": "train.epochs",
        "output": "run.path",
        "accumulate_grad_batches": "train.accumulate_steps",
        "gradient_accumulation_steps": "train.accumulate_steps",
        "mixed_precision": "train.precision",
        "allow_tf32": "train.tf32",
    }
    """Names of other programs for our keys, for suggestions that a search by spelling would miss."""
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        "run.",
        "checkpoint.",
        "resume.",
        "log.",
        "publish.",
        "optimizer.reset_state_from_step",
        "train.epochs",
        "train.precision",
        "train.tf32",
        "train.accumulate_steps",
        "train.early_stop.",
        "table.placement",
        "table.cache_bytes",
    )
    """Prefixes of the keys that may change when a run is resumed. They do not change results, except
    for the rounding of products and sums, which may depend on the machine anyway, and for further epochs."""

    def check(self) -> None:
        """Checks ranges that types do not express; each model's configuration also checks its own keys.

        Raises:
            UserError: a value is out of range.
        """
        for key, value in _numbers(self):
            if isinstance(value, float) and not abs(value) <= _MAX_FLOAT:
                raise UserError(f"{key} must be a finite number of 32 bits, got {value}")
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise UserError(f"{key} must be below 2**63, got {value}")
        require_at_least_one(self._counts())
        if self.start_from is None and self.start_from_grow:
            raise UserError("start_from_grow=true needs start_from, the run whose tables grow: give start_from too")
        if self.start_from is not None and (
            not self.start_from.strip("/") or _is_within(self.run.path, self.start_from)
        ):
            raise UserError(
                f"start_from={self.start_from} must be the folder of another run, and run.path a new one outside it, "
                f"got run.path={self.run.path}"
            )
        self.table.check()
        if not self.run.path.strip("/"):
            raise UserError(f"run.path must name a folder, such as runs/x, got {self.run.path!r}")
        for key, seconds in self._seconds():
            if seconds is not None and not 0 < seconds <= _MAX_SECONDS:
                raise UserError(f"{key} must be more than 0 and at most {_MAX_SECONDS:g} seconds, got {seconds:g}")
        for name in ("max_failures", "max_extra_memory_bytes"):
            setting = getattr(self.checkpoint, name)
            if setting is not None and setting < 0:
                raise UserError(f"checkpoint.{name} must be at least 0, got {setting}")
        if self.train.early_stop.min_delta < 0:
            raise UserError(f"train.early_stop.min_delta must be at least 0, got {self.train.early_stop.min_delta}")
        if not 0 <= self.schedule.warmup < 1:
            raise UserError(f"schedule.warmup must be a share of the run in [0, 1), got {self.schedule.warmup}")
        if self.schedule.name == "inverse_sqrt" and self.schedule.warmup == 0:
            raise UserError(
                "schedule.name=inverse_sqrt decays from the end of its warm-up: set schedule.warmup to more than 0"
            )
        if not 0 <= self.schedule.min_factor <= 1:
            raise UserError(f"schedule.min_factor must be in [0, 1], got {self.schedule.min_factor}")
        if wrong := [name for name in self.table_names() if not name or "/" in name]:
            raise UserError(
                f"{wrong[0]!r} cannot name a table: the name of a column in a table must not be empty or contain '/'. "
                "Rename the column in the files, or with data.columns if their first line does not name the columns"
            )
        self.optimizer.check(self.table_names())
        dense_sections = [each for each in vars(self).values() if isinstance(each, DenseOptimizerConfig)]
        for each in dense_sections:
            each.check()
        if not dense_sections and (self.train.precision != "float32" or self.train.tf32):
            raise UserError(
                f"train.precision and train.tf32 need dense layers, but model={self.model} has none: leave them out"
            )
        if self.run.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"run.device must be auto, cpu or cuda, got {self.run.device!r}")

    @property
    def num_best(self) -> int | None:
        """Number of best checkpoints that the run keeps; None for none."""
        return num_best(self.checkpoint.keep_best, self.train.early_stop.patience)

    def table_names(self) -> list[str]:
        """Returns the names of the model's tables."""
        raise NotImplementedError(f"{type(self).__name__} must implement table_names")

    @property
    def reads_standard_input(self) -> bool:
        """Whether the data come from standard input, which can be read only once."""
        return False

    @property
    def holds_out(self) -> bool:
        """Whether the run holds out a part of its data itself, to measure the trained model on."""
        return False

    @property
    def answers_from_histories(self) -> bool:
        """Whether the model makes a user's list from items of the user that it is given, not from a row of the user."""
        return False

    def _seconds(self) -> Iterator[tuple[str, float | None]]:
        yield "run.timeout_seconds", self.run.timeout_seconds
        yield "checkpoint.every_seconds", self.checkpoint.every_seconds
        yield "publish.every_seconds", self.publish.every_seconds
        yield "publish.timeout_seconds", self.publish.timeout_seconds

    def _counts(self) -> Iterator[tuple[str, Any]]:
        yield "train.epochs", self.train.epochs
        yield "schedule.epochs", self.schedule.epochs
        yield "train.accumulate_steps", self.train.accumulate_steps
        yield "train.early_stop.patience", self.train.early_stop.patience
        yield "log.every_steps", self.log.every_steps
        yield "log.rows_every_steps", self.log.rows_every_steps
        for name in ("every_steps", "keep_last", "keep_every", "keep_best", "full_every"):
            yield f"checkpoint.{name}", getattr(self.checkpoint, name)


def refuse_stream(path: Any, reason: str) -> None:
    """Refuses standard input for a model that cannot learn from a stream.

    Raises:
        UserError: the path is standard input.
    """
    if path == STANDARD_INPUT:
        raise UserError(
            f"data.path=- cannot be used: {reason}, and standard input can be read only once: write it to a file"
        )


def refuse_without_effect(key: str, section: Any, losses_of: Mapping[str, Sequence[str]]) -> None:
    """Refuses a setting that differs from its default although the section's loss does not use it.

    Args:
        key: the section's key.
        section: has a setting `loss`.
        losses_of: by name of a setting, the losses that use it.

    Raises:
        UserError: there is such a setting.
    """
    for name, losses in losses_of.items():
        if section.loss not in losses and getattr(section, name) != getattr(type(section), name):
            raise UserError(f"{key}.{name} has no effect with {key}.loss={section.loss}: leave it out")


def require_paths(paths: Mapping[str, str | list[str] | None], *, may_be_none: bool = False) -> None:
    """Checks that each path is given.

    Raises:
        UserError: a path is empty, or there is none.
    """
    for key, value in paths.items():
        if value is None and may_be_none:
            continue
        if not value or not all(value):
            raise UserError(f"{key} must be a path or a list of paths, got {value!r}")


def _numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the key and value of each number, also in lists and in dicts of sections."""
    if is_dataclass(section):
        section = {each.name: getattr(section, each.name) for each in fields(section)}
    if isinstance(section, float | int):
        yield prefix, section
    elif isinstance(section, dict | list):
        named = section.items() if isinstance(section, dict) else enumerate(section)
        for name, value in named:
            yield from _numbers(value, f"{prefix}.{name}" if prefix else str(name))


def _is_within(path: str, folder: str) -> bool:
    """Returns whether a path is a folder or is below it."""
    inner, outer = (each if "://" in each else os.path.abspath(each) for each in (path, folder))
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def require_at_least_one(counts: Iterator[tuple[str, Any]], *, at_most: int = MAX_COUNT) -> None:
    """Checks counts by key; None stands for no limit.

    Raises:
        UserError: one is less than 1, or more than `at_most`.
    """
    for key, value in counts:
        if value is not None and not (isinstance(value, float | int) and value >= 1):
            raise UserError(f"{key} must be at least 1, got {value}")
        if value is not None and value > at_most:
            raise UserError(f"{key} must be at most {at_most:,}, got {value:,}")
