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
    """Settings of one categorical column; null uses the setting of `data` or `table` for all columns."""

    num_rows: int | None = None
    """Number of rows of its table; null for data.num_rows."""
    encoding: Literal["vocabulary", "hash", "id"] | None = None
    """How a value becomes a row; null for data.encoding."""
    min_count: int | None = None
    """With a vocabulary: values with fewer occurrences share row 0; null for data.min_count."""
    dim: int | None = None
    """Length of its vectors; null for table.dim."""
    bag: bool = False
    """Whether an example may have several values or none: a list in Parquet, text with separators in other files."""
    separator: str = "|"
    """Separator of the values of a bag in a text."""
    pooling: Literal["sum", "mean"] = "mean"
    """How the vectors of a bag are pooled."""
    init_from: str | None = None
    """File of initial vectors by value, in any format that `export` writes; needs a vocabulary."""


@dataclass
class ClicksConfig(RowFilesConfig):
    """Names the click log and the meaning of its columns."""

    path: str | list[str] = "???"
    """A file, a glob, a folder, or a list of them, on any fsspec URL; or - for standard input."""
    stream: bool = False
    """Whether to train on each line once, in order, as it arrives: from a folder to which files are added, or from one
    file. Standard input is always a stream."""
    poll_seconds: float | None = None
    """Seconds between two checks for new files in a streamed folder; null ends the run after the last file."""
    valid_path: str | list[str] | None = None
    """Held-out examples, measured during training; null for none."""
    format: str = "csv"
    """csv, tsv, jsonl or parquet; or criteo, which is tab-separated: a label, 13 integers (I1 to I13), 26 hexadecimal
    tokens (C1 to C26)."""
    label: str = "label"
    """The column to predict."""
    positive: str | None = None
    """Value of the label that counts as 1; null if labels are 0 and 1."""
    dense: list[str] = field(default_factory=list)
    """Columns of numbers; in the criteo format all 13."""
    dense_transform: Literal["log1p", "none"] = "log1p"
    """log1p transforms x to sign(x) * log(1 + |x|). Afterwards numbers are normalised to mean 0 and variance 1."""
    categorical: list[str] = field(default_factory=list)
    """Columns to look up in tables; a dense column may also be categorical. In the criteo format all 26."""
    num_rows: int | None = None
    """Number of rows of each table; null for one row per distinct value."""
    encoding: Literal["vocabulary", "hash", "id"] | None = None
    """How a value becomes a row; null hashes if num_rows is given, and else makes a vocabulary."""
    min_count: int = 1
    """With a vocabulary: values with fewer occurrences share row 0."""
    features: dict[str, FeatureConfig] = field(default_factory=dict)
    """Settings of single categorical columns, by name."""
    max_bad_lines: int = 0
    """Maximum number of bad lines to skip."""
    block_examples: int = 32
    """Consecutive examples that are read together; a step consists of whole blocks from random positions of the log."""
    cache_path: str = "~/.cache/embedtrain"
    """Local folder of the prepared log."""

    @property
    def is_stream(self) -> bool:
        """Whether the examples are a stream."""
        return self.stream or self.path == STANDARD_INPUT


@dataclass
class NetworkConfig:
    """Holds the settings of the dense part; see `embedtrain.recipes.ranking.model.NetworkOptions`."""

    architecture: Literal["dlrm", "dcn_v2"] = "dcn_v2"
    """dlrm uses the dot products of all pairs of features; dcn_v2 uses cross layers."""
    bottom: list[int] = field(default_factory=lambda: [64])
    """dlrm: sizes of the hidden layers over the dense features, before a layer of table.dim."""
    top: list[int] = field(default_factory=lambda: [128, 64])
    """Sizes of the hidden layers before the prediction."""
    num_cross_layers: int = 3
    """dcn_v2: number of cross layers."""
    low_rank: int | None = None
    """dcn_v2: rank of the cross layers' matrices; null for full matrices."""


@dataclass
class RankingTrainConfig(TrainConfig):
    """Settings of the training loop."""

    epochs: int = 1
    global_batch_size: int = 4096
    """Examples per step over all ranks."""


def _optimizer() -> OptimizerConfig:
    return section("rowwise_adagrad", lr=0.05, eps=1e-8, initial_accumulator_value=0.0)


@dataclass
class RankingConfig(Config):
    """The configuration of a ranking run."""

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
    # The log is compared by content, so its path may change.
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
        """Whether the data come from standard input, which can be read only once."""
        return bool(self.data.path == STANDARD_INPUT)

    def check(self) -> None:
        """Checks ranges that types do not express."""
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
            raise UserError("data.poll_seconds needs a streamed folder: give data.stream=true too")
        reads_blocks = not self.data.is_stream or self.data.valid_path is not None
        if reads_blocks and self.train.global_batch_size % self.data.block_examples:
            raise UserError(
                "train.global_batch_size must be a multiple of data.block_examples, got "
                f"{self.train.global_batch_size} and {self.data.block_examples}"
            )
        if self.data.positive == "":
            raise UserError("data.positive must not be empty: a line without a label is a bad line")
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
                raise UserError(f"data.format=criteo already defines data.{', data.'.join(given)}: leave it out")

    def _check_stream(self) -> None:
        """Refuses settings that need the end of the data or several passes, which a stream does not have."""
        data = self.data
        if not isinstance(data.path, str):
            raise UserError(f"data.path of a stream must be -, a file or a folder, got {data.path}")
        if data.poll_seconds is not None and (data.path == STANDARD_INPUT or not 0 < data.poll_seconds < math.inf):
            raise UserError(
                f"data.poll_seconds must be positive and needs a streamed folder, got {data.poll_seconds} for "
                f"{data.path}"
            )
        if self.train.epochs != 1:
            raise UserError(f"train.epochs must be 1, because a stream is read once, got {self.train.epochs}")
        if self.schedule.name != "constant" or self.schedule.warmup:
            raise UserError(
                f"schedule.name={self.schedule.name} with schedule.warmup={self.schedule.warmup} needs the number of "
                "steps, which is not known for a stream: give schedule.name=constant (optimizer.lr_decay lowers the "
                "rate with the steps)"
            )
