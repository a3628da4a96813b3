"""The configuration of SASRec, which predicts a user's next item."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from embedtrain.config.interactions import InteractionsConfig
from embedtrain.config.optimizer import DenseOptimizerConfig, OptimizerConfig, section
from embedtrain.config.sections import (
    MAX_WIDTH,
    Config,
    EvaluateConfig,
    TableConfig,
    TrainConfig,
    file_keys,
    refuse_without_effect,
    require_at_least_one,
    require_paths,
)
from embedtrain.data.readers import AUTO, require_format
from embedtrain.errors import UserError
from embedtrain.recipes.layout import layout_of

ITEM = "item"
"""Name of the table."""


@dataclass
class SasrecSection:
    """Settings of the network and the loss."""

    loss: Literal["full_softmax", "sampled_softmax"] = "full_softmax"
    """full_softmax normalises over all items; sampled_softmax over items drawn in each step, for large catalogues."""
    max_length: int = 50
    """Maximum number of a user's newest items from which a prediction is made."""
    layers: int = 2
    """Number of blocks; a block is an attention layer and a perceptron."""
    heads: int = 2
    """Number of attention heads; must divide table.dim."""
    inner: int | None = None
    """Width of the perceptrons' hidden layers; null for table.dim."""
    dropout: float = 0.3
    """Dropout rate after the inputs, the attention layers and the perceptrons."""
    negatives: int = 1024
    """sampled_softmax: number of items drawn per step, shared by all its predictions."""
    power: float = 0.5
    """sampled_softmax: items are drawn with probability proportional to count ** power; 0 is uniform, 1 is by
    popularity."""


@dataclass
class SasrecTrainConfig(TrainConfig):
    """Settings of the training loop."""

    epochs: int = 8
    global_batch_size: int = 1536
    """Predictions per step over all ranks; approximate, because a step consists of whole sequences."""


@dataclass
class SasrecEvaluateConfig(EvaluateConfig):
    """Says how to measure on held-out items, which are ranked among all items."""

    every_epochs: int | None = 2
    """Epochs between two measurements; null to use every_steps only."""
    path: str | list[str] | None = None
    """Files of interactions later than those of data.path, in the same format; an alternative to data.split. null for
    none."""
    k: list[int] = field(default_factory=lambda: [10])
    """Lengths of the recommendation lists that are measured."""


@dataclass
class SasrecConfig(Config):
    """The configuration of a SASRec run."""

    model: Literal["sasrec"] = "sasrec"
    data: InteractionsConfig = field(
        default_factory=lambda: InteractionsConfig(split="leave_one_out", validation="leave_one_out")
    )
    table: TableConfig = field(default_factory=lambda: TableConfig(dim=128))
    sasrec: SasrecSection = field(default_factory=SasrecSection)
    train: SasrecTrainConfig = field(default_factory=SasrecTrainConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: section("rowwise_adagrad", lr=0.1, initial_accumulator_value=0.0)
    )
    dense_optimizer: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    evaluate: SasrecEvaluateConfig = field(default_factory=SasrecEvaluateConfig)

    MEANT: ClassVar[Mapping[str, str]] = {
        **Config.MEANT,
        "batch_size": "train.global_batch_size",
        "embedding_size": "table.dim",
        "hidden_size": "table.dim",
        "inner_size": "sasrec.inner",
        "n_layers": "sasrec.layers",
        "n_heads": "sasrec.heads",
        "hidden_dropout_prob": "sasrec.dropout",
        "maxlen": "sasrec.max_length",
        "MAX_ITEM_LIST_LENGTH": "sasrec.max_length",
        "topk": "evaluate.k",
    }
    # The data are compared by content, so their paths may change.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *Config.MAY_CHANGE,
        *file_keys("data"),
        "data.cache_path",
        "evaluate.",
    )

    @property
    def inner(self) -> int:
        """Width of the perceptrons' hidden layers."""
        return self.table.dim if self.sasrec.inner is None else self.sasrec.inner

    def table_names(self) -> list[str]:
        """Returns the name of the table."""
        return [ITEM]

    @property
    def holds_out(self) -> bool:
        """See `Config.holds_out`."""
        return self.data.split != "none"

    @property
    def answers_from_histories(self) -> bool:
        """See `Config.answers_from_histories`."""
        return True

    def check(self) -> None:
        """Checks ranges that types do not express."""
        super().check()
        self.data.check(self.evaluate.path)
        require_format(self.data.format, (AUTO,), "data.format")
        layout_of(self.data, "data")
        require_paths({"evaluate.path": self.evaluate.path}, may_be_none=True)
        for key, rule in (("split", self.data.split), ("validation", self.data.validation_rule)):
            if rule == "ratio":
                raise UserError(
                    f"data.{key}={getattr(self.data, key)} draws items at random, but model=sasrec predicts the next "
                    "item: give leave_one_out or by_time"
                )
        refuse_without_effect("sasrec", self.sasrec, dict.fromkeys(("negatives", "power"), ("sampled_softmax",)))
        require_at_least_one(self._own_counts())
        require_at_least_one(self._widths(), at_most=MAX_WIDTH)
        settings = self.sasrec
        if self.table.dim % settings.heads:
            raise UserError(
                f"sasrec.heads={settings.heads} must divide table.dim={self.table.dim}: heads split each vector evenly"
            )
        if not 0 <= settings.dropout < 1:
            raise UserError(f"sasrec.dropout must be at least 0 and below 1, got {settings.dropout}")
        if not 0 <= settings.power <= 1:
            raise UserError(f"sasrec.power must be in [0, 1], got {settings.power}")
        if self.train.global_batch_size < settings.max_length:
            raise UserError(
                f"train.global_batch_size={self.train.global_batch_size} must be at least "
                f"sasrec.max_length={settings.max_length}: a step takes whole sequences"
            )
        if not self.evaluate.k:
            raise UserError("evaluate.k must name at least one length, such as [10,20]")

    def _own_counts(self) -> Iterator[tuple[str, Any]]:
        yield "table.dim", self.table.dim
        yield "train.global_batch_size", self.train.global_batch_size
        yield "sasrec.negatives", self.sasrec.negatives
        yield "evaluate.every_steps", self.evaluate.every_steps
        yield "evaluate.every_epochs", self.evaluate.every_epochs
        yield from (("evaluate.k", k) for k in self.evaluate.k)

    def _widths(self) -> Iterator[tuple[str, Any]]:
        yield from (
            (f"sasrec.{name}", getattr(self.sasrec, name)) for name in ("max_length", "layers", "heads", "inner")
        )
