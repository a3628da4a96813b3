"""The configuration of ranking models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from embedtrain.config.optimizer import DenseOptimizerConfig, OptimizerConfig, section
from embedtrain.config.sections import (
    MAX_WIDTH,
    Config,
    EvaluateConfig,
    RowFilesConfig,
    TableConfig,
    TrainConfig,
    require_at_least_one,
    require_paths,
)
from embedtrain.data.click_schema import CRITEO, CRITEO_CATEGORICAL
from embedtrain.data.readers import require_format
from embedtrain.data.stream import STANDARD_INPUT
from embedtrain.errors import UserError
from embedtrain.recipes.layout import layout_of

_MAX_LAYERS = 1000


@dataclass
class FeatureConfig:
    """What one categorical column has of its own; null takes what `data` and `table` say for all."""

    num_rows: int | None = None
    """Rows of its table; null takes data.num_rows."""
    encoding: Literal["vocabulary", "hash", "id"] | None = None
    """How a value becomes a row; null takes data.encoding."""
    min_count: int | None = None
    """Of a vocabulary: values seen less often share a row; null takes data.min_count."""
    dim: int | None = None
    """Columns of its table."""
    bag: bool = False
    """Whether an example has any number of values: a list in Parquet, text between separators in other files."""
    separator: str = "|"
    """Between the values of a bag in a text."""
    pooling: Literal["sum", "mean"] = "mean"
    """How the vectors of a bag become one."""
    init_from: str | None = None
    """A file of vectors by value, of any format that `export` writes, that its rows start from; with a vocabulary."""


@dataclass
class ClicksConfig(RowFilesConfig):
    """The click log, and what its columns mean."""

    path: str | list[str] = "???"
    """A file, a glob, a folder, a list of them, on any fsspec URL; or - for standard input."""
    stream: bool = False
    """Train on each line once, in order, as it comes: of a folder that files are added to, or of one file. Standard
    input is always a stream."""
    poll_seconds: float | None = None
    """Of a streamed folder: how often to look for new files after the last one; null ends the run there."""
    valid_path: str | list[str] | None = None
    """Held-out examples, measured during training; null for none."""
    format: str = "csv"
    """csv, tsv, jsonl or parquet; or criteo, which is tab-separated: a label, 13 integers (I1 to I13), 26 hexadecimal
    tokens (C1 to C26)."""
    label: str = "label"
    """The column to predict."""
    positive: str | None = None
    """The label's value that counts as 1; null for labels of 0 and 1."""
    dense: list[str] = field(default_factory=list)
    """Columns of numbers; of the criteo format, all 13."""
    dense_transform: Literal["log1p", "none"] = "log1p"
    """log1p takes sign(x) * log(1 + |x|). Either way numbers are then normalised to mean 0 and variance 1."""
    categorical: list[str] = field(default_factory=list)
    """Columns to look up in tables; may repeat dense ones. Of the criteo format, all 26."""
    num_rows: int | None = None
    """Rows of each table; null gives each distinct value a row."""
    encoding: Literal["vocabulary", "hash", "id"] | None = None
    """How a value becomes a row; null hashes if num_rows is given, and else makes a vocabulary."""
    min_count: int = 1
    """Of a vocabulary: values seen less often share a row."""
    features: dict[str, FeatureConfig] = field(default_factory=dict)
    """What single categorical columns have of their own."""
    max_bad_lines: int = 0
    """How many lines that cannot be used are left out."""
    block_examples: int = 32
    """Consecutive examples that are read together; a step is made of whole blocks from all over the log."""
    cache_path: str = "~/.cache/embedtrain"
    """Local folder for the prepared log."""

    @property
    def is_stream(self) -> bool:
        """Whether the examples are read once, as they come."""
        return self.stream or self.path == STANDARD_INPUT


@dataclass
class NetworkConfig:
    """The dense part; see `embedtrain.recipes.ranking.model.NetworkOptions`."""

    architecture: Literal["dlrm", "dcn_v2"] = "dcn_v2"
    """dlrm multiplies the vectors of all features by each other; dcn_v2 crosses them layer by layer."""
    bottom: list[int] = field(default_factory=lambda: [64])
    """Of dlrm: hidden layers over the dense features, before a layer of table.dim."""
    top: list[int] = field(default_factory=lambda: [128, 64])
    """Hidden layers before the prediction."""
    num_cross_layers: int = 3
    """Of dcn_v2: how often features are crossed."""
    low_rank: int | None = None
    """Of dcn_v2: rank of the matrices of the cross layers; null for full matrices."""


@dataclass
class RankingTrainConfig(TrainConfig):
    """The loop over a click log."""

    epochs: int = 1
    global_batch_size: int = 4096
    """Examples of a step, over all ranks."""


def _optimizer() -> OptimizerConfig:
    return section("rowwise_adagrad", lr=0.05, eps=1e-8, initial_accumulator_value=0.0)


@dataclass
class RankingConfig(Config):
    """Everything that defines a run of a ranking model."""

    model: Literal["ranking"] = "ranking"
    data: ClicksConfig = field(default_factory=ClicksConfig)
    table: TableConfig = field(default_factory=lambda: TableConfig(dim=16))
    ranking: NetworkConfig = field(default_factory=NetworkConfig)
    train: RankingTrainConfig = field(default_factory=RankingTrainConfig)
    optimizer: OptimizerConfig = field(default_factory=_optimizer)
    dense_optimizer: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    MEANT: ClassVar[Mapping[str, str]] = {
        **Config.MEANT,
        "batch_size": "train.global_batch_size",
        "target": "data.label",
        "embedding_dim": "table.dim",
    }
    # Whether the log is the same is judged by its content.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *Config.MAY_CHANGE,
        "evaluate.",
        "data.path",
        "data.delimiter",
        "data.quote",
        "data.valid_path",
        "data.cache_path",
        "data.max_bad_lines",
    )

    def table_names(self) -> list[str]:
        """Returns the categorical columns."""
        all_of_format = CRITEO_CATEGORICAL if self.data.format == "criteo" else ()
        return list(self.data.categorical or all_of_format)

    @property
    def reads_standard_input(self) -> bool:
        """Whether the data are what comes on standard input, which can be read once."""
        return bool(self.data.path == STANDARD_INPUT)

    def check(self) -> None:
        """Checks the ranges that types cannot say."""
        super().check()
        require_format(self.data.format, (CRITEO,), "data.format", with_names=True)
        layout_of(self.data, "data")
        require_paths({"data.path": self.data.path})
        require_paths({"data.valid_path": self.data.valid_path}, may_be_none=True)
        counts = {
            "table.dim": self.table.dim,
            "train.global_batch_size": self.train.global_batch_size,
            "data.block_examples": self.data.block_examples,
            "evaluate.every_epochs": self.evaluate.every_epochs,
            "evaluate.every_steps": self.evaluate.every_steps,
        }
        counts.update({"data.num_rows": self.data.num_rows, "data.min_count": self.data.min_count})
        for name, feature in self.data.features.items():
            own = {"dim": feature.dim, "num_rows": feature.num_rows, "min_count": feature.min_count}
            counts.update({f"data.features.{name}.{key}": value for key, value in own.items()})
        require_at_least_one(iter(counts.items()))
        network = self.ranking
        widths = [("ranking.bottom", size) for size in network.bottom] + [("ranking.top", size) for size in network.top]
        require_at_least_one(iter([*widths, ("ranking.low_rank", network.low_rank)]), at_most=MAX_WIDTH)
        require_at_least_one(iter([("ranking.num_cross_layers", network.num_cross_layers)]), at_most=_MAX_LAYERS)
        if self.data.is_stream:
            self._check_stream()
        elif self.data.poll_seconds is not None:
            raise UserError("data.poll_seconds is for a folder that is read as a stream: give data.stream=true too")
        reads_blocks = not self.data.is_stream or self.data.valid_path is not None
        if reads_blocks and self.train.global_batch_size % self.data.block_examples:
            raise UserError(
                "train.global_batch_size must be a multiple of data.block_examples, got "
                f"{self.train.global_batch_size} and {self.data.block_examples}"
            )
        if self.data.positive == "":
            raise UserError("data.positive must not be empty: a label that is missing makes a bad line")
        if self.data.max_bad_lines < 0:
            raise UserError(f"data.max_bad_lines must be at least 0, got {self.data.max_bad_lines}")
        if self.data.format == "criteo":
            fixed: dict[str, Any] = {
                "columns": None,
                "delimiter": None,
                "quote": "auto",
                "label": "label",
                "positive": None,
                "dense": [],
            }
            given = [name for name, default in fixed.items() if getattr(self.data, name) != default]
            if given:
                raise UserError(f"data.format=criteo says what data.{', data.'.join(given)} says: leave it out")

    def _check_stream(self) -> None:
        """Refuses what a stream cannot have: its end is not known, and it comes once."""
        data = self.data
        if not isinstance(data.path, str):
            raise UserError(f"data.path of a stream is -, a file or a folder, got {data.path}")
        if data.poll_seconds is not None and (data.path == STANDARD_INPUT or not 0 < data.poll_seconds < math.inf):
            raise UserError(
                f"data.poll_seconds is a time between two looks at a folder, got {data.poll_seconds} for {data.path}"
            )
        if self.train.epochs != 1:
            raise UserError(f"a stream is read once: expected train.epochs=1, got {self.train.epochs}")
        if self.schedule.name != "constant" or self.schedule.warmup:
            raise UserError(
                f"the end of a stream is not known, and schedule.name={self.schedule.name} with "
                f"schedule.warmup={self.schedule.warmup} is a share of the way to it: give schedule.name=constant "
                "(optimizer.lr_decay falls with the steps)"
            )
