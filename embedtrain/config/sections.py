"""The sections of a configuration that every model has."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
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
"""What is larger is infinite in 32 bits."""


@dataclass
class RunConfig:
    """The run itself."""

    path: str = "runs/default"
    """Folder of the run, any fsspec URL; the same command resumes what lies there."""
    device: str = "auto"
    """auto (one GPU per rank if the host has GPUs, else cpu), cpu or cuda."""
    timeout_seconds: float = 600.0
    """How long a collective waits for a rank before the run fails."""


@dataclass
class TableConfig:
    """The tables of a model."""

    dim: int = 100
    """Columns."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of the rows."""
    wire_dtype: Literal["float32", "bfloat16"] | None = None
    """In which vectors and gradients travel between ranks; null: as stored, and float32."""
    placement: Literal["device", "host", "auto"] = "device"
    """Where rows and optimizer state live; auto takes host memory if the GPU's does not suffice."""
    cache_bytes: int | None = None
    """Of the GPU's memory, for copies of hot rows that live on the host; null for half of what is free."""

    def check(self) -> None:
        """Checks what types cannot say."""
        if self.cache_bytes is not None and (self.cache_bytes < 0 or self.placement == "device"):
            raise UserError(
                f"table.cache_bytes must be at least 0 and goes with table.placement=host or auto, got "
                f"{self.cache_bytes} and {self.placement}"
            )


@dataclass
class RowFilesConfig:
    """How files of rows are read."""

    format: str = "auto"
    """auto goes by the suffix of each file; or csv, tsv, jsonl or parquet, which have columns; or lines."""
    columns: list[str] | None = None
    """Names of the columns of csv and tsv, in order; null if each file's first line holds them."""
    delimiter: str | None = None
    """Between the fields of csv; null for a comma."""
    quote: str | None = "auto"
    """The character that quotes fields of csv and tsv; null for none; auto: " in csv, none in tsv."""


@dataclass
class EarlyStopConfig:
    """Ending before the last epoch, when checkpoint.best_metric gets no better."""

    patience: int | None = None
    """Training ends after this many measurements in a row without an improvement; null trains to the end. The best
    checkpoint is kept."""
    min_delta: float = 0.0
    """By how much a measurement must be better than the last improvement to be one."""


@dataclass
class TrainConfig:
    """The loop."""

    epochs: int = 5
    """Passes over the data. A run that is resumed with more goes on, at the rates of a schedule of them all."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """In which dense layers and the scores of retrieval multiply matrices. bfloat16 runs forward passes under
    torch.autocast; parameters, optimizers and rows of tables stay as they are."""
    tf32: bool = False
    """Whether GPUs multiply the float32 matrices of dense layers and of the scores of retrieval in TF32."""
    accumulate_steps: int = 1
    """Micro-batches of a step: each rank trains on its part of a step in so many pieces, and then updates once. The
    result equals that of the undivided step, up to rounding. Only one micro-batch's vectors and activations are in
    memory at a time."""
    early_stop: EarlyStopConfig = field(default_factory=EarlyStopConfig)


@dataclass
class ScheduleConfig:
    """The learning rate over the run."""

    name: Literal["constant", "linear", "cosine", "inverse_sqrt"] = "linear"
    """How the rate falls: not at all, in a line to zero, along half a cosine, or with the root of the steps."""
    warmup: float = 0.0
    """Share of the run over which the rate first rises to its base."""
    min_factor: float = 1e-4
    """The rate does not fall below this factor of its base."""


@dataclass
class EvaluateConfig:
    """When to measure on held-out data during training; the end of the run is always measured."""

    every_epochs: int | None = 1
    """Epochs between two measurements; null leaves it to the steps."""
    every_steps: int | None = None
    """Steps between two measurements; null leaves it to the epochs."""


@dataclass
class CheckpointConfig:
    """When to save; the end of the run is always saved."""

    every_steps: int | None = None
    """Steps between two saves; null leaves it to the clock."""
    every_seconds: float | None = 600.0
    """Seconds between two saves, by rank 0's clock; null leaves it to the steps."""
    mode: Literal["async", "sync"] = "async"
    """async writes in the background while training goes on; sync writes before it goes on."""
    max_extra_memory_bytes: int | None = 2**30
    """Bound on a rank's copies of rows that change during a save in the background; null for none."""
    max_failures: int = 3
    """Failed saves in a row that are only warned of."""
    full_every: int = 1
    """Every `full_every`-th save is full; the others hold only changed rows."""
    keep_last: int | None = 3
    """How many of the newest stay. If keep_last, keep_every and keep_best are null, all stay."""
    keep_every: int | None = None
    """Checkpoints stay whose step is a multiple of this."""
    keep_best: int | None = None
    """How many of the best by best_metric stay. Held-out measurements that would be among them are saved."""
    best_metric: str = Retention.best_metric
    """A name in metrics.jsonl; its newest value when the checkpoint is saved counts."""
    best_mode: Literal["auto", "min", "max"] = Retention.best_mode
    """Whether the smallest or the largest values of best_metric are the best; auto knows embedtrain's own measures."""


@dataclass
class ResumeConfig:
    """How a run comes back from its newest checkpoint."""

    on_corrupt: Literal["error", "fallback"] = "error"
    """error refuses a damaged one; fallback takes the newest older one that is whole, and deletes the damaged."""
    convert_dtype: bool = False
    """Whether table.dtype may differ from the checkpoint's."""
    optimizer_state: Literal["require", "reset"] = "require"
    """reset starts the optimizer's state anew."""
    tables: list[str] | None = None
    """Load these tables only and start the others anew; null for all."""


@dataclass
class LogConfig:
    """What is shown and kept."""

    every_steps: int = 50
    """Steps between two records of the loss, the speed and the like."""
    tensorboard: bool = True
    """Also write scalars for TensorBoard into the run folder, if that is local."""
    wandb: str | None = None
    """Project of Weights & Biases that gets the same numbers; null for none."""
    mlflow: str | None = None
    """Experiment of MLflow that gets them; null for none."""
    rows_every_steps: int | None = 1000
    """How often TensorBoard gets the rows' effective learning rates and the growth of the optimizer's state."""


@dataclass
class PublishConfig:
    """Publication while the run trains."""

    to: str | None = None
    """URL of a folder or of Redis that gets what changed, as `embedtrain publish --to` has it; null for none."""
    every_seconds: float = 600.0
    """Least seconds between two publications, each of a newer checkpoint, or of the best if the run keeps its best; its
    end is published too."""
    timeout_seconds: float = 3600.0
    """A publication that takes longer is ended and warned of."""


@dataclass
class Config:
    """What defines a run of any model; each model's own configuration adds its sections."""

    model: str = "???"
    """word2vec, retrieval, ranking, or a model that an installed package brings."""
    seed: int = 1
    """Of all random draws: first values, the order of the data, negatives."""
    start_from: str | None = None
    """Folder of a trained run whose rows, optimizer state and dense part this one begins with; null begins anew."""
    start_from_grow: bool = False
    """With start_from: whether what is new in the data gets rows; otherwise it counts as unknown."""
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
    """Names that other programs have for our keys, too far from them for a search by spelling."""
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
    """Beginnings of the keys that a resumed run may give anew: where rows live changes no result, how products and sums
    are rounded may depend on the machine, and further epochs follow those that are done."""

    def check(self) -> None:
        """Checks the ranges that types cannot say; a model's configuration checks its own too.

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
            raise UserError("start_from_grow=true gives rows to what another run did not know: give start_from too")
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
            raise UserError("schedule.name=inverse_sqrt falls from the end of its warm-up: give schedule.warmup too")
        if not 0 <= self.schedule.min_factor <= 1:
            raise UserError(f"schedule.min_factor must be in [0, 1], got {self.schedule.min_factor}")
        if wrong := [name for name in self.table_names() if not name or "/" in name]:
            raise UserError(
                f"{wrong[0]!r} cannot name a table, whose name is that of its column: it may not be empty or hold '/'. "
                "Rename the column in the files, or with data.columns if their first line does not name the columns"
            )
        self.optimizer.check(self.table_names())
        dense_sections = [each for each in vars(self).values() if isinstance(each, DenseOptimizerConfig)]
        for each in dense_sections:
            each.check()
        if not dense_sections and (self.train.precision != "float32" or self.train.tf32):
            raise UserError(
                f"train.precision and train.tf32 are for dense layers, and model={self.model} has none: leave them out"
            )
        if self.run.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"run.device must be auto, cpu or cuda, got {self.run.device!r}")

    @property
    def num_best(self) -> int | None:
        """How many of the best checkpoints the run keeps; None for none."""
        return num_best(self.checkpoint.keep_best, self.train.early_stop.patience)

    def table_names(self) -> list[str]:
        """Returns the names of the model's tables."""
        raise NotImplementedError(f"{type(self).__name__} does not name its tables")

    @property
    def reads_standard_input(self) -> bool:
        """Whether the data are what comes on standard input, which can be read once."""
        return False

    @property
    def holds_out(self) -> bool:
        """Whether the run holds out a part of its data itself, to measure the trained model on."""
        return False

    def _seconds(self) -> Iterator[tuple[str, float | None]]:
        yield "run.timeout_seconds", self.run.timeout_seconds
        yield "checkpoint.every_seconds", self.checkpoint.every_seconds
        yield "publish.every_seconds", self.publish.every_seconds
        yield "publish.timeout_seconds", self.publish.timeout_seconds

    def _counts(self) -> Iterator[tuple[str, Any]]:
        yield "train.epochs", self.train.epochs
        yield "train.accumulate_steps", self.train.accumulate_steps
        yield "train.early_stop.patience", self.train.early_stop.patience
        yield "log.every_steps", self.log.every_steps
        yield "log.rows_every_steps", self.log.rows_every_steps
        for name in ("every_steps", "keep_last", "keep_every", "keep_best", "full_every"):
            yield f"checkpoint.{name}", getattr(self.checkpoint, name)


def refuse_stream(path: Any, reason: str) -> None:
    """Refuses standard input as the data of a model that cannot learn from a stream.

    Raises:
        UserError: the path is that of standard input.
    """
    if path == STANDARD_INPUT:
        raise UserError(
            f"data.path=-: {reason}, and standard input comes once: write it to a file; a stream is for model=ranking"
        )


def require_paths(paths: Mapping[str, str | list[str] | None], *, may_be_none: bool = False) -> None:
    """Checks paths by their keys.

    Raises:
        UserError: a path is empty, or there is none.
    """
    for key, value in paths.items():
        if value is None and may_be_none:
            continue
        if not value or not all(value):
            raise UserError(f"{key} must be a path or a list of paths, got {value!r}")


def _numbers(section: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the key and value of each number, those in lists and in dicts of sections too."""
    if is_dataclass(section):
        section = {each.name: getattr(section, each.name) for each in fields(section)}
    if isinstance(section, float | int):
        yield prefix, section
    elif isinstance(section, dict | list):
        named = section.items() if isinstance(section, dict) else enumerate(section)
        for name, value in named:
            yield from _numbers(value, f"{prefix}.{name}" if prefix else str(name))


def _is_within(path: str, folder: str) -> bool:
    """Returns whether a path is that of a folder or lies below it."""
    inner, outer = (each if "://" in each else os.path.abspath(each) for each in (path, folder))
    return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")


def require_at_least_one(counts: Iterator[tuple[str, Any]], *, at_most: int = MAX_COUNT) -> None:
    """Checks counts by their keys; None stands for no limit.

    Raises:
        UserError: one is less than 1, or more than `at_most`.
    """
    for key, value in counts:
        if value is not None and not (isinstance(value, float | int) and value >= 1):
            raise UserError(f"{key} must be at least 1, got {value}")
        if value is not None and value > at_most:
            raise UserError(f"{key} must be at most {at_most:,}, got {value:,}")
