"""The configuration of retrieval: which items a user will turn to."""

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
    require_at_least_one,
    require_paths,
)
from embedtrain.data.readers import AUTO, require_format
from embedtrain.errors import UserError
from embedtrain.recipes.layout import layout_of

USER, ITEM = "user", "item"
"""The tables of the ids; the table of a feature is called "user.age", for example."""

Loss = Literal["softmax", "bilateral_softmax", "bpr", "cosine_contrastive", "alignment_uniformity"]
Normalize = Literal["none", "users", "items", "both"]

SOFTMAXES = ("softmax", "bilateral_softmax")
OF_COSINES = ("cosine_contrastive", "alignment_uniformity")
"""Losses of vectors of length 1 alone."""

_MAX_WEIGHT = 1e6


@dataclass
class FeatureConfig:
    """A column of categories."""

    separator: str | None = None
    """What parts the categories of a cell; null for one category a cell, or a list column of Parquet."""


@dataclass
class SideConfig(RowFilesConfig):
    """What is known of the users, or of the items, and how it becomes a vector."""

    path: str | list[str] | None = None
    """Files with a row for each; null if only ids are known."""
    id_column: str = "id"
    """The column of the raw ids."""
    features: dict[str, FeatureConfig] = field(default_factory=dict)
    """By the name of the column."""
    hidden: list[int] = field(default_factory=list)
    """Hidden layers over the vectors of id and features; [] adds the vectors up, without a dense part."""
    base_vocabulary: str | None = None
    """A file of ids, as `grow` writes one, that have a row and whose counts are added to those of the data."""
    init_from: str | None = None
    """A file of vectors by raw id, of any format that `export` writes, that those of the ids start from."""


@dataclass
class RetrievalSection:
    """The model's own settings."""

    loss: Loss = "bilateral_softmax"
    """What training makes small: softmax over the negatives, with the positive among them or beside them (bilateral),
    BPR over pairs, SimpleX's cosine contrastive loss, or DirectAU's alignment and uniformity."""
    normalize: Normalize = "both"
    """Whose vectors are scaled to length 1 before their dot product is taken; with both it is a cosine."""
    temperature: float = 0.1
    """The scores of softmax, bilateral softmax and BPR are divided by it."""
    negative_weight: float | None = None
    """The weight of the negatives' term of bilateral_softmax (null: by how skewed the items' counts are) and of
    cosine_contrastive (null: 100); of uniformity in alignment_uniformity (null: 1)."""
    negatives: int = 256
    """Items drawn for each step, for all its users; 0 for in_batch alone."""
    popularity_share: float = 0.0
    """The share of the drawn items that are drawn by popularity; the others are drawn uniformly."""
    in_batch: bool = True
    """Whether the other users' items of the step, over all ranks, are negatives too."""
    hard_negatives: int | None = None
    """Of each user's negatives only so many with the highest scores count; null for all."""
    logq: bool = True
    """Whether both kinds of softmax correct for how often each item comes up as a negative."""
    margin: float = 0.5
    """Of cosine_contrastive: negatives that score less cost nothing."""

    def check(self, accumulate_steps: int) -> None:
        """Checks the ranges that types cannot say."""
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
        if self.negative_weight is not None and self.loss in ("softmax", "bpr"):
            raise UserError(f"retrieval.negative_weight means nothing to retrieval.loss={self.loss}: leave it out")
        if self.popularity_share > 0 and self.negatives == 0:
            raise UserError("retrieval.popularity_share means nothing to retrieval.negatives=0: leave it out")
        if self.loss in OF_COSINES and self.normalize != "both":
            raise UserError(
                f"retrieval.loss={self.loss} compares cosines: it needs retrieval.normalize=both, got {self.normalize}"
            )
        if self.loss == "alignment_uniformity":
            if self.hard_negatives is not None:
                raise UserError("retrieval.hard_negatives means nothing to retrieval.loss=alignment_uniformity")
            if accumulate_steps > 1:
                raise UserError(
                    "retrieval.loss=alignment_uniformity compares all users of a step with each other: it needs "
                    f"train.accumulate_steps=1, got {accumulate_steps}"
                )


@dataclass
class RetrievalTrainConfig(TrainConfig):
    """The loop over the interactions."""

    epochs: int = 20
    global_batch_size: int = 256
    """Examples of a step over all ranks; an example is a user with some of their items."""
    items_per_example: int = 4
    """At most so many; 1 gives pairs of user and item."""


@dataclass
class RetrievalEvaluateConfig(EvaluateConfig):
    """Measuring on held-out interactions, over all items but those that the user is known to have."""

    path: str | list[str] | None = None
    """As data.path, in the same format; null for no measuring."""
    k: list[int] = field(default_factory=lambda: [20])
    """Lengths of the list of recommendations."""


@dataclass
class RetrievalConfig(Config):
    """Everything that defines a run of retrieval."""

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
    # Whether the data are the same is judged by their content.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        *Config.MAY_CHANGE,
        *file_keys("data", "users", "items"),
        "data.cache_path",
        "users.base_vocabulary",
        "items.base_vocabulary",
        "evaluate.",
    )

    def table_names(self) -> list[str]:
        """Returns the tables of users and items, each before those of its features."""
        sides = {USER: self.users, ITEM: self.items}
        return [table for side, own in sides.items() for table in (side, *(f"{side}.{name}" for name in own.features))]

    @property
    def holds_out(self) -> bool:
        """See `Config.holds_out`."""
        return self.data.split != "none"

    def check(self) -> None:
        """Checks the ranges that types cannot say."""
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
                raise UserError(f"{name}.path is given, but no column of it: name them under {name}.features")

    def _own_counts(self) -> Iterator[tuple[str, Any]]:
        yield "table.dim", self.table.dim
        yield "train.global_batch_size", self.train.global_batch_size
        yield "train.items_per_example", self.train.items_per_example
        yield "evaluate.every_steps", self.evaluate.every_steps
        yield "evaluate.every_epochs", self.evaluate.every_epochs
        yield from (("evaluate.k", k) for k in self.evaluate.k)
