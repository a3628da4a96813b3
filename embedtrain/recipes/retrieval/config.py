"""The configuration of retrieval models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from embedtrain.config.interactions import InteractionsConfig
from embedtrain.config.optimizer import DenseOptimizerConfig, OptimizerConfig, section
from embedtrain.config.sections import (
    MAX_COUNT,
    MAX_WIDTH,
    Config,
    EvaluateConfig,
    RowFilesConfig,
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

USER, ITEM = "user", "item"
"""Names of the tables of ids; a feature's table is named "user.age", for example."""

Loss = Literal["softmax", "bilateral_softmax", "bpr", "cosine_contrastive", "alignment_uniformity"]
Normalize = Literal["none", "users", "items", "both"]

SOFTMAXES = ("softmax", "bilateral_softmax")
OF_COSINES = ("cosine_contrastive", "alignment_uniformity")
"""Losses that are defined on vectors of length 1 only."""

_LOSSES_OF = {
    "temperature": (*SOFTMAXES, "bpr"),
    "negative_weight": ("bilateral_softmax", *OF_COSINES),
    "hard_negatives": (*SOFTMAXES, "bpr", "cosine_contrastive"),
    "logq": SOFTMAXES,
    "margin": ("cosine_contrastive",),
}
"""The losses that use a setting, for settings that not all of them use."""

_MAX_WEIGHT = 1e6


@dataclass
class FeatureConfig:
    """Settings of one column of categories."""

    separator: str | None = None
    """Separator of the categories in a cell; null for one category per cell, or a list column of Parquet."""


@dataclass
class SideConfig(RowFilesConfig):
    """Features of the users, or of the items, and the layers that turn them into a vector."""

    path: str | list[str] | None = None
    """Files of features with one row per id; null if there are no features."""
    id_column: str = "id"
    """Column of the raw ids in these files."""
    features: dict[str, FeatureConfig] = field(default_factory=dict)
    """Settings of the feature columns, by name."""
    hidden: list[int] = field(default_factory=list)
    """Sizes of the hidden layers over the vectors of id and features; [] sums the vectors, without a dense part."""
    base_vocabulary: str | None = None
    """Vocabulary file that `grow` writes. Its ids get rows, and its counts are added to the counts of the data."""
    init_from: str | None = None
    """File of initial vectors by raw id, in any format that `export` writes; null for none."""


@dataclass
class RetrievalSection:
    """Settings of scores, loss and negatives."""

    loss: Loss = "bilateral_softmax"
    """Training loss. softmax normalises over the positive and the negatives, bilateral_softmax over the negatives only;
    bpr compares pairs; cosine_contrastive is SimpleX; alignment_uniformity is DirectAU."""
    normalize: Normalize = "both"
    """Which vectors are scaled to length 1 before the dot product; with both, scores are cosines."""
    temperature: float = 0.1
    """softmax, bilateral_softmax and bpr divide scores by this."""
    negative_weight: float | None = None
    """Weight of the negatives' term in bilateral_softmax and cosine_contrastive, and of uniformity in
    alignment_uniformity. null: 1 to 1.35 in bilateral_softmax, larger for more skewed item counts; 100 in
    cosine_contrastive; 1 in alignment_uniformity."""
    negatives: int = 256
    """Number of sampled negatives per step, shared by all its users; 0 leaves the in-batch negatives only."""
    popularity_share: float = 0.0
    """Share of the sampled negatives that is drawn by popularity; the others are drawn uniformly."""
    in_batch: bool = True
    """Whether the items of the step's other users, over all ranks, are negatives too."""
    hard_negatives: int | None = None
    """Number of highest-scoring negatives per user that enter the loss; null for all negatives."""
    logq: bool = True
    """Whether softmax and bilateral_softmax subtract from each score the log of the item's expected frequency among
    the negatives (logQ correction)."""
    margin: float = 0.5
    """cosine_contrastive: negatives with a lower score cost nothing."""

    def check(self, accumulate_steps: int) -> None:
        """Checks ranges that types do not express."""
        if not 0 <= self.negatives <= MAX_COUNT:
            raise UserError(f"retrieval.negatives must be in [0, {MAX_COUNT:,}], got {self.negatives:,}")
        if self.negatives == 0 and not self.in_batch:
            raise UserError("retrieval.negatives=0 leaves no negatives: give some, or retrieval.in_batch=true")
        if not self.temperature > 0:
            raise UserError(f"retrieval.temperature must be positive, got {self.temperature}")
        if self.negative_weight is not None and not 0 <= self.negative_weight <= _MAX_WEIGHT:
            raise UserError(f"retrieval.negative_weight must be in [0, {_MAX_WEIGHT:g}], got {self.negative_weight}")
        if not 0 <= self.popularity_share <= 1:
            raise UserError(f"retrieval.popularity_share must be in [0, 1], got {self.popularity_share}")
        if self.hard_negatives is not None and not 1 <= self.hard_negatives <= MAX_COUNT:
            raise UserError(f"retrieval.hard_negatives must be in [1, {MAX_COUNT:,}], got {self.hard_negatives:,}")
        refuse_without_effect("retrieval", self, _LOSSES_OF)
        if self.popularity_share > 0 and self.negatives == 0:
            raise UserError("retrieval.popularity_share has no effect with retrieval.negatives=0: leave it out")
        if self.loss in OF_COSINES and self.normalize != "both":
            raise UserError(
                f"retrieval.loss={self.loss} compares cosines: it needs retrieval.normalize=both, got {self.normalize}"
            )
        if self.loss == "alignment_uniformity" and accumulate_steps > 1:
            raise UserError(
                "retrieval.loss=alignment_uniformity compares all users of a step with each other: it needs "
                f"train.accumulate_steps=1, got {accumulate_steps}"
            )


@dataclass
class RetrievalTrainConfig(TrainConfig):
    """Settings of the training loop."""

    epochs: int = 20
    global_batch_size: int = 256
    """Examples per step over all ranks; an example is a user with up to items_per_example of their items."""
    items_per_example: int = 4
    """Maximum number of items per example; 1 gives pairs of a user and an item."""


@dataclass
class RetrievalEvaluateConfig(EvaluateConfig):
    """Says how to measure on held-out interactions. Items that a user has in training are never recommended."""

    path: str | list[str] | None = None
    """Files of held-out interactions, in the format of data.path; an alternative to data.split. null for none."""
    k: list[int] = field(default_factory=lambda: [20])
    """Lengths of the recommendation lists that are measured."""


@dataclass
class RetrievalConfig(Config):
    """The configuration of a retrieval run."""

    model: Literal["retrieval"] = "retrieval"
    data: InteractionsConfig = field(default_factory=InteractionsConfig)
    users: SideConfig = field(default_factory=SideConfig)
    items: SideConfig = field(default_factory=SideConfig)
    table: TableConfig = field(default_factory=lambda: TableConfig(dim=64))
    retrieval: RetrievalSection = field(default_factory=RetrievalSection)
    train: RetrievalTrainConfig = field(default_factory=RetrievalTrainConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: section("rowwise_adagrad", lr=0.3, initial_accumulator_value=0.0, max_norm=1.0)
    )
    dense_optimizer: DenseOptimizerConfig = field(default_factory=DenseOptimizerConfig)
    evaluate: RetrievalEvaluateConfig = field(default_factory=RetrievalEvaluateConfig)

    MEANT: ClassVar[Mapping[str, str]] = {
        **Config.MEANT,
        "batch_size": "train.global_batch_size",
        "embedding_size": "table.dim",
        "factors": "table.dim",
        "tau": "retrieval.temperature",
        "neg_sampling": "retrieval.negatives",
        "topk": "evaluate.k",
    }
    # The data are compared by content, so their paths may change.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *Config.MAY_CHANGE,
        *file_keys("data", "users", "items"),
        "data.cache_path",
        "users.base_vocabulary",
        "items.base_vocabulary",
        "evaluate.",
    )

    def table_names(self) -> list[str]:
        """Returns the names of the tables: users and their features, then items and their features."""
        sides = {USER: self.users, ITEM: self.items}
        return [table for side, own in sides.items() for table in (side, *(f"{side}.{name}" for name in own.features))]

    @property
    def holds_out(self) -> bool:
        """See `Config.holds_out`."""
        return self.data.split != "none"

    def check(self) -> None:
        """Checks ranges that types do not express."""
        super().check()
        self.data.check(self.evaluate.path)
        for name, part in (("data", self.data), ("users", self.users), ("items", self.items)):
            require_format(part.format, (AUTO,), f"{name}.format")
            layout_of(part, name)
        optional = {
            "evaluate.path": self.evaluate.path,
            "users.path": self.users.path,
            "items.path": self.items.path,
        }
        require_paths(optional, may_be_none=True)
        require_at_least_one(self._own_counts())
        for name, side in (("users", self.users), ("items", self.items)):
            require_at_least_one(((f"{name}.hidden", size) for size in side.hidden), at_most=MAX_WIDTH)
        self.retrieval.check(self.train.accumulate_steps)
        if not self.evaluate.k:
            raise UserError("evaluate.k must name at least one length, such as [10,20]")
        for name, side in (("users", self.users), ("items", self.items)):
            if side.features and side.path is None:
                raise UserError(f"{name}.features needs {name}.path, the files that hold these columns")
            if side.path is not None and not side.features:
                raise UserError(f"{name}.path needs {name}.features, which names the columns to read")

    def _own_counts(self) -> Iterator[tuple[str, Any]]:
        yield "table.dim", self.table.dim
        yield "train.global_batch_size", self.train.global_batch_size
        yield "train.items_per_example", self.train.items_per_example
        yield "evaluate.every_steps", self.evaluate.every_steps
        yield "evaluate.every_epochs", self.evaluate.every_epochs
        yield from (("evaluate.k", k) for k in self.evaluate.k)
