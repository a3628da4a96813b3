"""Retrieval models, matrix factorisation and two towers, on sharded tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from embedtrain.data.bags import Bags
from embedtrain.data.retrieval_batches import RetrievalBatch
from embedtrain.embedding.collection import CollectionOptions, EmbeddingCollection
from embedtrain.embedding.input_dist import Asked
from embedtrain.jagged import Jagged, places_of_runs
from embedtrain.ops._backend.transfer import to_device, to_host
from embedtrain.recipes.retrieval import losses
from embedtrain.recipes.retrieval.config import ITEM as ITEM
from embedtrain.recipes.retrieval.config import OF_COSINES, SOFTMAXES
from embedtrain.recipes.retrieval.config import USER as USER
from embedtrain.recipes.retrieval.config import Loss as Loss
from embedtrain.recipes.retrieval.config import Normalize as Normalize
from embedtrain.spec import DEFAULT_OPTIMIZER, FeatureSpec, TableSpec
from embedtrain.train.task import Objective

if TYPE_CHECKING:
    from typing_extensions import Unpack


_SMALL = 0.01
"""Standard deviation of initial values near 0."""


@dataclass(frozen=True)
class Side:
    """Describes the users or the items.

    Attributes:
        num_rows: number of users or items.
        features: by name, the categories of each row and the number of distinct categories.
        hidden: sizes of the hidden layers over the vectors of id and features; if empty, the vectors are summed.
    """

    num_rows: int
    features: Mapping[str, tuple[Bags, int]] = field(default_factory=dict)
    hidden: Sequence[int] = ()


@dataclass(frozen=True)
class Scoring:
    """Holds the options of scores and loss. A score is the dot product of a user's and an item's vector.

    Attributes:
        loss: the training loss; see `embedtrain.recipes.retrieval.losses`.
        normalize: which vectors are scaled to length 1 before the dot product; with "both", scores are cosines.
        temperature: divisor of the scores in softmax, bilateral softmax and BPR.
        logq: whether softmax and bilateral softmax subtract from each score the log of the item's expected count among
            the negatives.
        hard_negatives: number of highest-scoring negatives per user that enter the loss; None for all.
        negative_weight: weight of the negatives' term in bilateral softmax and in the cosine contrastive loss, and of
            uniformity in `alignment_uniformity`.
        margin: margin of the cosine contrastive loss.

    Raises:
        ValueError: the loss needs cosines, but `normalize` is not "both".
    """

    loss: Loss = "bilateral_softmax"
    normalize: Normalize = "both"
    temperature: float = 0.1
    logq: bool = True
    hard_negatives: int | None = None
    negative_weight: float = 1.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        if self.loss in OF_COSINES and self.normalize != "both":
            raise ValueError(f"the loss {self.loss} compares cosines: normalize must be 'both', got {self.normalize!r}")

    def is_unit(self, side: str) -> bool:
        """Returns whether the vectors of a side are scaled to length 1."""
        return self.normalize in ("both", f"{side}s")


def retrieval_tables(
    sizes: Mapping[str, int], dim: int, dtype: torch.dtype, scoring: Scoring, optimizers: Mapping[str, str]
) -> list[TableSpec]:
    """Returns the tables of ids and of the categories of features. A table without rows gets one unused row.

    Vectors that are scaled to length 1 start with about this length, because the length of a vector determines how
    fast its direction changes. Ids with features start near 0, so that features determine the vector of untrained ids.

    Args:
        sizes: number of rows by table; see `RetrievalConfig.table_names`.
        dim: length of all vectors.
        dtype: dtype of the rows.
        scoring: options of the scores.
        optimizers: `TableSpec.optimizer` by table; other tables have the default.
    """
    sides_with_features = {side for side, _, feature in (name.partition(".") for name in sizes) if feature}

    def scale(name: str) -> float:
        begins_near_0 = name in sides_with_features or not scoring.is_unit(name.partition(".")[0])
        return _SMALL if begins_near_0 else float(dim**-0.5)

    return [
        TableSpec(name, max(1, rows), dim, dtype, "normal", scale(name), optimizers.get(name, DEFAULT_OPTIMIZER))
        for name, rows in sizes.items()
    ]


@dataclass(frozen=True)
class Pairs:
    """Holds the comparisons of a batch, on the device.

    Attributes:
        example: [m] int64; index of each positive's user.
        corrections: logQ corrections of the positives [m] and the candidates [c], which are subtracted from scores: the
            log of each item's expected count among the candidates. None if the loss has no correction.
        known: [k] int64 each; indices of users and of candidates that the users are known to have.
    """

    example: Tensor
    corrections: tuple[Tensor, Tensor] | None
    known: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PreparedPairs:
    """Holds a batch whose ids were exchanged.

    Attributes:
        batch: the batch.
        pairs: its comparisons, on the device.
        vectors: pending look-ups of the vectors of its users and items.
    """

    batch: RetrievalBatch
    pairs: Pairs
    vectors: Asked


class Retrieval(nn.Module):
    """Computes a vector per user and per item; their dot product scores how likely the user chooses the item.

    A vector is the sum of the id's vector and the vectors of its features, or the output of a perceptron over their
    concatenation. A feature with several categories has the mean of their vectors. Without features and hidden layers
    the model is matrix factorisation.

    Args:
        users: the users.
        items: the items.
        dim: length of all vectors.
        scoring: options of scores and loss.
        dtype: dtype of the tables.
        optimizers: `TableSpec.optimizer` by table; other tables have the default.
        options: see `EmbeddingCollection`; the dense part has the same seed.

    Attributes:
        dense: the perceptrons; without parameters if no side has hidden layers.
    """

    def __init__(
        self,
        users: Side,
        items: Side,
        dim: int,
        scoring: Scoring,
        *,
        dtype: torch.dtype = torch.float32,
        optimizers: Mapping[str, str] | None = None,
        **options: Unpack[CollectionOptions],
    ) -> None:
        super().__init__()
        self.sides = {USER: users, ITEM: items}
        self.scoring = scoring
        sizes: dict[str, int] = {}
        for name, side in self.sides.items():
            sizes |= {name: side.num_rows, **{f"{name}.{f}": n for f, (_, n) in side.features.items()}}
        tables = retrieval_tables(sizes, dim, dtype, scoring, optimizers or {})
        features = [FeatureSpec(table, pooling="none" if table in self.sides else "mean") for table in sizes]
        self.tables = EmbeddingCollection(tables, features, **options)
        self.dense = nn.ModuleDict()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.get("seed", 0))
            for name, side in self.sides.items():
                if side.hidden:
                    self.dense[name] = perceptron((1 + len(side.features)) * dim, side.hidden, dim)
        self.dense.to(self.tables.device)

    def forward(self, batch: RetrievalBatch | PreparedPairs) -> Objective:
        """Returns the loss of this rank's batch. Collective: every rank, and its backward too."""
        prepared = self.prepare(batch, is_ahead=False) if isinstance(batch, RetrievalBatch) else batch
        batch = prepared.batch
        num_positives = batch.positives.numel()
        encoded = self._encode((USER, ITEM), prepared.vectors)
        users, items = encoded[USER], encoded[ITEM]
        own = items if batch.in_batch else items[num_positives:]
        candidates = self.tables.ranks.all_gather_rows(own, batch.candidate_counts)
        if self.scoring.loss == "alignment_uniformity":
            aligned = losses.alignment(users, prepared.pairs.example, items[:num_positives])
            return self._with_uniformity(aligned, batch, users, own, candidates)
        per_pair = pair_losses(prepared.pairs, self.scoring, users, items[:num_positives], candidates)
        total = per_pair.sum()
        return Objective(self._mean(total, batch), total.detach().double(), num_positives)

    def _mean(self, total: Tensor, batch: RetrievalBatch) -> Tensor:
        # The factor makes this a mean over the global batch, because the exchange averages gradients over the ranks.
        return total * (self.tables.ranks.size / max(1, batch.num_global_positives))

    def _with_uniformity(
        self, aligned: Tensor, batch: RetrievalBatch, users: Tensor, own: Tensor, candidates: Tensor
    ) -> Objective:
        """Returns the loss from the alignment of pairs [m] and the uniformity of the step's users and candidates.

        Collective: every rank, and its backward too. Each rank compares its own vectors with the vectors of all ranks.
        """
        ranks = self.tables.ranks
        sides = (
            (users, ranks.all_gather_rows(users, batch.user_counts), batch.user_counts),
            (own, candidates, batch.candidate_counts),
        )
        potentials = torch.stack(
            [losses.potential(mine, every, sum(counts[: ranks.rank])) for mine, every, counts in sides]
        )
        totals = ranks.all_reduce(potentials.detach().double()).clamp_(min=torch.finfo(torch.float32).tiny)
        weight = self.scoring.negative_weight / len(sides)
        # Has the gradient of the log of `totals`. The factor `size` undoes the averaging of gradients over the ranks.
        gradient = (potentials / totals.float()).sum() * (weight * ranks.size)
        num_pairs = [max(1, len(every) * (len(every) - 1)) for _, every, _ in sides]
        uniformity = weight * (totals.log().sum() - sum(map(math.log, num_pairs)))
        total = aligned.sum()
        loss = self._mean(total, batch) + gradient
        return Objective(loss, total.detach().double() + aligned.numel() * uniformity, aligned.numel())

    def encode(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the vectors of rows [n] of each side, [n, dim], normalised if scores need it.

        Collective: every rank, with the same sides.
        """
        return self._encode(rows, self._ask(rows, is_ahead=False))

    def encode_described(self, name: str, id_vector: Tensor, features: Mapping[str, Jagged], num_rows: int) -> Tensor:
        """Returns the vectors [num_rows, dim] of users or items with features but without rows. Collective: every rank.

        Args:
            name: the side.
            id_vector: [dim]; replaces the vectors of their ids.
            features: categories of each user or item, by feature.
            num_rows: number of users or items.
        """
        vectors = self.tables.look_up(self.tables.ask({f"{name}.{key}": bags for key, bags in features.items()}))
        return self._join(name, {**vectors, name: id_vector.expand(num_rows, -1)})

    def prepare(self, batch: RetrievalBatch, *, is_ahead: bool = True) -> PreparedPairs:
        """Exchanges the ids of a step, for `forward` later. Collective: every rank, in order of steps."""
        rows = {USER: batch.users, ITEM: torch.cat([batch.positives, batch.negatives])}
        pairs = pairs_of(batch, self.scoring, self.tables.device)
        return PreparedPairs(batch, pairs, self._ask(rows, is_ahead=is_ahead))

    def bring_rows(self, prepared: PreparedPairs) -> None:
        """Copies rows of a step from host memory to the device."""
        self.tables.bring_rows(prepared.vectors)

    def _ask(self, rows: Mapping[str, Tensor], *, is_ahead: bool) -> Asked:
        asked: dict[str, Jagged] = {}
        for name, ids in rows.items():
            asked[name] = Jagged.from_ids(ids)
            for feature, (bags, _) in self.sides[name].features.items():
                values, lengths = bags.of(to_host(ids).numpy())
                asked[f"{name}.{feature}"] = Jagged(torch.from_numpy(values), torch.from_numpy(lengths))
        return self.tables.ask(asked, is_ahead=is_ahead)

    def _encode(self, sides: Iterable[str], asked: Asked) -> dict[str, Tensor]:
        vectors = self.tables.look_up(asked)
        return {name: self._join(name, vectors) for name in sides}

    def _join(self, name: str, vectors: Mapping[str, Tensor]) -> Tensor:
        parts = [vectors[table] for table in (name, *(f"{name}.{f}" for f in self.sides[name].features))]
        if name in self.dense:
            joined: Tensor = self.dense[name](torch.cat(parts, dim=1)).float()
        else:
            joined = torch.stack(parts).sum(dim=0) if len(parts) > 1 else parts[0]
        return self.as_compared(name, joined)

    def as_compared(self, name: str, vectors: Tensor) -> Tensor:
        """Returns vectors [n, dim] of a side as scores use them: scaled to length 1 if the side is normalised."""
        return losses.unit_vectors(vectors) if self.scoring.is_unit(name) else vectors


def pairs_of(batch: RetrievalBatch, scoring: Scoring, device: torch.device) -> Pairs:
    """Returns the comparisons of a batch, on a device."""
    corrections = None
    if scoring.loss in SOFTMAXES and scoring.logq:
        of_positives, of_candidates = batch.expected
        corrections = to_device(of_positives, device).log(), to_device(of_candidates, device).log()
    rows, columns = _known_among(batch.known, batch.candidates)
    return Pairs(to_device(batch.example, device), corrections, (to_device(rows, device), to_device(columns, device)))


def pair_losses(pairs: Pairs, scoring: Scoring, users: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """Returns the loss of each positive of a batch; [m].

    Args:
        pairs: the comparisons.
        scoring: options of scores and loss.
        users: [n, dim]; vectors of the batch's users.
        positives: [m, dim]; vectors of the positives.
        candidates: [c, dim]; vectors of the candidates of all ranks.
    """
    example = pairs.example
    if scoring.loss != "cosine_contrastive":
        users = users / scoring.temperature  # divides fewer numbers than dividing the scores
    positive, correction = (users[example] * positives).sum(dim=1), None
    if pairs.corrections is not None:
        of_positives, of_candidates = pairs.corrections
        correction = -of_candidates
        if scoring.loss == "softmax":  # only its sum contains the positive, which is then corrected too
            positive = positive - of_positives
    if scoring.loss in SOFTMAXES:
        if scoring.hard_negatives is None:
            log_sum = losses.log_sum_of_scores(users, candidates, correction, pairs.known)
        else:
            negative = losses.scores_of(users, candidates, correction, pairs.known)
            log_sum = torch.logsumexp(losses.hardest(negative, scoring.hard_negatives), dim=1)
        if scoring.loss == "softmax":
            return losses.softmax_loss(positive, example, log_sum)
        return losses.bilateral_softmax_loss(positive, example, log_sum, weight=scoring.negative_weight)
    negative = losses.scores_of(users, candidates, correction, pairs.known)
    if scoring.hard_negatives is not None:
        negative = losses.hardest(negative, scoring.hard_negatives)
    if scoring.loss == "bpr":
        return losses.bpr_loss(positive, example, negative)
    return losses.cosine_contrastive_loss(
        positive, example, negative, margin=scoring.margin, weight=scoring.negative_weight
    )


def _known_among(known: Jagged, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the indices of users and of candidates for all pairs in which the user is known to have the candidate.

    Args:
        known: per user, the candidates that the user has.
        candidates: [c] int64 items; may repeat.
    """
    in_order, place = candidates.sort()
    first = torch.searchsorted(in_order, known.values)
    times = torch.searchsorted(in_order, known.values, right=True) - first
    return torch.repeat_interleave(known.bag_of_values(), times), place[places_of_runs(first, times)]


def perceptron(size: int, hidden: Sequence[int], dim: int) -> nn.Sequential:
    """Returns the layers of a tower: `size` inputs, hidden layers with ReLU, and `dim` outputs."""
    layers: list[nn.Module] = []
    for wide in hidden:
        layers += [nn.Linear(size, wide), nn.ReLU()]
        size = wide
    return nn.Sequential(*layers, nn.Linear(size, dim))
