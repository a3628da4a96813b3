"""Ranking models, DLRM and DCN-V2: the probability of a click from dense and categorical features."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedtrain.data.click_batches import ClickBatch, ClickBatches
from embedtrain.embedding.collection import CollectionOptions, EmbeddingCollection
from embedtrain.embedding.input_dist import Asked
from embedtrain.errors import UserError
from embedtrain.metrics.classification import TRAINING_BINS, ClassificationMeter, classification_sums
from embedtrain.ops._backend.transfer import to_device
from embedtrain.spec import FeatureSpec, TableSpec
from embedtrain.train.task import Objective

if TYPE_CHECKING:
    from typing_extensions import Unpack

Architecture = Literal["dlrm", "dcn_v2"]

HELD_OUT = "valid_"
"""Prefix of the metrics of held-out examples."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """Options of the dense part of a ranking model.

    Attributes:
        architecture: "dlrm" (dot products of all pairs of features) or "dcn_v2" (cross layers parallel to an MLP).
        bottom: DLRM: hidden sizes of the MLP over the dense features; its last layer has the interaction's dim.
        top: hidden sizes of an MLP; DLRM: over the interactions; DCN-V2: parallel to the cross layers.
        num_cross_layers: DCN-V2: number of cross layers.
        low_rank: DCN-V2: rank of each cross layer's matrix; None for a full one.

    Raises:
        UserError: an option is out of range.
    """

    architecture: Architecture = "dcn_v2"
    bottom: tuple[int, ...] = (64,)
    top: tuple[int, ...] = (128, 64)
    num_cross_layers: int = 3
    low_rank: int | None = None

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Architecture):
            raise UserError(f"architecture must be one of {get_args(Architecture)}, got {self.architecture!r}")
        sizes = [*self.bottom, *self.top, self.num_cross_layers, 1 if self.low_rank is None else self.low_rank]
        if min(sizes) < 1:
            raise UserError(f"sizes and numbers of layers of the network must be at least 1, got {sizes}")


class DLRM(nn.Module):
    """Computes DLRM, an MLP over the dot products of all pairs of features; the dense features are one feature.

    Features of other dims are first projected to the largest dim.

    Args:
        num_dense: number of dense features.
        dims: dims of the categorical features.
        options: sizes of the layers.

    Source: Naumov et al. 2019, "Deep learning recommendation model for personalization and recommendation systems".
    """

    def __init__(self, num_dense: int, dims: Sequence[int], options: NetworkOptions) -> None:
        super().__init__()
        dim = max(dims)
        self.bottom = _mlp([num_dense, *options.bottom, dim]) if num_dense else None
        self.projections = nn.ModuleList(nn.Identity() if d == dim else nn.Linear(d, dim, bias=False) for d in dims)
        num_vectors = len(dims) + (num_dense > 0)
        pairs = torch.tril_indices(num_vectors, num_vectors, offset=-1)
        self.register_buffer("_pairs", pairs[0] * num_vectors + pairs[1], persistent=False)
        width = pairs.shape[1] + (dim if num_dense else 0)
        self.top = _mlp([width, *options.top])
        self.output = nn.Linear(options.top[-1] if options.top else width, 1)

    def forward(self, dense: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Returns logits [n] of dense features [n, num_dense] and one vector [n, dim] per categorical feature."""
        inputs = [project(vector) for project, vector in zip(self.projections, vectors, strict=True)]
        if self.bottom is not None:
            inputs.insert(0, self.bottom(dense))
        stacked = torch.stack(inputs, dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2)).flatten(1).index_select(1, self._pairs)  # type: ignore[arg-type]
        features = products if self.bottom is None else torch.cat([inputs[0], products], dim=1)
        return self.output(self.top(features)).squeeze(1)  # type: ignore[no-any-return]


class DCNv2(nn.Module):
    """Computes DCN-V2, cross layers parallel to an MLP, both over the concatenation of all features.

    A cross layer is `x0 * (W x + b) + x`; with `low_rank`, `W = U V`.

    Args:
        num_dense: number of dense features.
        dims: dims of the categorical features.
        options: sizes of the layers.

    Source: Wang et al. 2021, "DCN V2: Improved deep & cross network", in its parallel form.
    """

    def __init__(self, num_dense: int, dims: Sequence[int], options: NetworkOptions) -> None:
        super().__init__()
        width = num_dense + sum(dims)
        self.cross = nn.ModuleList(_cross(width, options.low_rank) for _ in range(options.num_cross_layers))
        self.deep = _mlp([width, *options.top]) if options.top else None
        self.output = nn.Linear(width + (options.top[-1] if options.top else 0), 1)

    def forward(self, dense: Tensor, vectors: Sequence[Tensor]) -> Tensor:
        """Returns logits [n] of dense features [n, num_dense] and one vector [n, dim] per categorical feature."""
        first = torch.cat([dense, *vectors], dim=1)
        crossed = first
        for layer in self.cross:
            crossed = torch.addcmul(crossed, first, layer(crossed))
        features = crossed if self.deep is None else torch.cat([crossed, self.deep(first)], dim=1)
        return self.output(features).squeeze(1)  # type: ignore[no-any-return]


NETWORKS: dict[Architecture, Callable[[int, Sequence[int], NetworkOptions], nn.Module]] = {
    "dlrm": DLRM,
    "dcn_v2": DCNv2,
}


def build_network(num_dense: int, dims: Sequence[int], options: NetworkOptions, seed: int) -> nn.Module:
    """Returns the dense part of a ranking model; its initial values depend only on the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[options.architecture](num_dense, dims, options)


@dataclass(frozen=True)
class PreparedClicks:
    """Holds a batch on the device whose ids were already exchanged.

    Attributes:
        labels: [n] float32.
        dense: [n, num_dense] float32.
        vectors: pending lookups of the features' vectors.
        num_global: number of examples of the step over all ranks.
    """

    labels: Tensor
    dense: Tensor
    vectors: Asked
    num_global: int


class Ranking(nn.Module):
    """Predicts the probability of label 1 from dense and categorical features.

    The tables are sharded over the ranks. The network is replicated, so its gradients must be averaged over the ranks,
    as `embedtrain.optim.dense.DenseOptimizer` does.

    Args:
        tables: tables of the features; see `EmbeddingCollection`.
        features: features with one vector per example; pooling "none" needs features with one value per example.
        num_dense: number of dense features.
        options: options of the network.
        collection: see `EmbeddingCollection`; the network uses its device and seed.
    """

    def __init__(
        self,
        tables: Sequence[TableSpec],
        features: Sequence[FeatureSpec],
        num_dense: int,
        options: NetworkOptions,
        **collection: Unpack[CollectionOptions],
    ) -> None:
        super().__init__()
        self.tables = EmbeddingCollection(tables, features, **collection)
        seed = collection.get("seed", 0)
        dims = {table.name: table.dim for table in tables}
        self._features = [feature.name for feature in features]
        self.network = build_network(num_dense, [dims[feature.table_name] for feature in features], options, seed)
        self.network.to(self.tables.device)

    def predict(self, batch: PreparedClicks) -> Tensor:
        """Returns logits [n]. Collective: every rank, and its backward too if gradients are enabled."""
        vectors = self.tables.look_up(batch.vectors)
        logits: Tensor = self.network(batch.dense, [vectors[name] for name in self._features])
        return logits.float()  # Under autocast, the loss is computed in float32.

    def forward(self, batch: ClickBatch | PreparedClicks) -> Objective:
        """Returns the loss of this rank's batch. Collective: see `predict`."""
        if isinstance(batch, ClickBatch):
            batch = self.prepare(batch, is_ahead=False)
        logits = self.predict(batch)
        losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        # The factor makes this a mean over the global batch: gradients are averaged over the ranks, whose numbers of
        # examples may differ.
        scale = self.tables.ranks.size / max(batch.num_global, 1)
        return Objective(
            loss=losses.sum() * scale,
            total=losses.detach().double().sum(),
            num_predictions=batch.labels.numel(),
            sums=classification_sums(logits, batch.labels, TRAINING_BINS),
        )

    def prepare(self, batch: ClickBatch, *, is_ahead: bool = True) -> PreparedClicks:
        """Prepares a batch for `forward` as far as no rows are needed. Collective: every rank, in order of steps."""
        device = self.tables.device
        vectors = self.tables.ask(batch.features, is_ahead=is_ahead)
        return PreparedClicks(
            to_device(batch.labels, device), to_device(batch.dense, device), vectors, batch.num_global
        )

    def bring_rows(self, prepared: PreparedClicks) -> None:
        """Copies the step's rows from host memory to the device."""
        self.tables.bring_rows(prepared.vectors)


def measure_ranking(model: Ranking, batches: ClickBatches, alive: Callable[[], None]) -> dict[str, float]:
    """Returns the metrics of a model on held-out examples.

    Collective: every rank.

    Args:
        model: the model with its tables.
        batches: batches of the held-out examples.
        alive: called after each batch.
    """
    meter = ClassificationMeter()
    with torch.no_grad():
        for step in range(batches.steps_per_epoch):
            batch = model.prepare(batches.batch(0, step), is_ahead=False)
            meter.add(model.predict(batch), batch.labels)
            alive()
    return meter.report(model.tables.ranks).as_record(HELD_OUT)


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers)


def _cross(width: int, low_rank: int | None) -> nn.Module:
    if low_rank is None:
        return nn.Linear(width, width)
    return nn.Sequential(nn.Linear(width, low_rank, bias=False), nn.Linear(low_rank, width))
