"""Retrieval: matrix factorisation and two towers, on sharded tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
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
"""Standard deviation of the first values of vectors that begin near 0."""


@dataclass(frozen=True)
class Side:
    """What is known of the users, or of the items.

    Attributes:
        num_rows: how many there are.
        features: by name, the categories of each row, and how many categories there are.
        hidden: sizes of the hidden layers over the vectors of id and features; with none these are added up.
    """

    num_rows: int
    features: Mapping[str, tuple[Bags, int]] = field(default_factory=dict)
    hidden: Sequence[int] = ()


@dataclass(frozen=True)
class Scoring:
    """How a user and an item are compared, and what for. A score is the dot product of two vectors.

    Attributes:
        loss: what training makes small; see `embedtrain.recipes.retrieval.losses`.
        normalize: whose vectors are scaled to length 1 first; with both, a score is a cosine.
        temperature: softmax, bilateral softmax and BPR see the scores divided by it.
        logq: whether both kinds of softmax correct for how often each item comes up as a negative.
        hard_negatives: of each user's negatives only so many with the highest scores count; None for all.
        negative_weight: of the negatives' term of bilateral softmax and of the cosine contrastive loss; of uniformity
            against alignment.
        margin: of the cosine contrastive loss.

    Raises:
        ValueError: the loss is one of cosines, and not both sides are normalised.
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
    """Returns the tables of ids and of the categories of features; one of no rows gets one that nobody asks for.

    First values of vectors that are scaled to length 1 have about that length. The direction of longer or shorter ones
    would change slower or quicker than their gradients say. Ids that have features begin near 0: so the features speak
    for ids that were not trained yet.

    Args:
        sizes: by table, how many rows it has; see `RetrievalConfig.table_names`.
        dim: of all vectors.
        dtype: of the rows.
        scoring: how users and items are compared.
        optimizers: by table, the `TableSpec.optimizer` of those that do not share the others'.
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
    """Who is compared with whom in a batch, on the device.

    Attributes:
        example: [m] int64; the place of each positive's user.
        corrections: of each positive [m] and of each candidate [c], what is taken from its score: the logarithm of how
            often it is expected among the candidates. None if the loss has none.
        known: [k] int64 each; the places of users and candidates that are an item that the user is known to have.
    """

    example: Tensor
    corrections: tuple[Tensor, Tensor] | None
    known: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PreparedPairs:
    """A batch for which the ids were exchanged.

    Attributes:
        batch: who is who.
        pairs: the same, on the device.
        vectors: of its users and items, asked for.
    """

    batch: RetrievalBatch
    pairs: Pairs
    vectors: Asked


class Retrieval(nn.Module):
    """A vector for each user and item; their dot product says which items a user will turn to.

    A side is the sum of its id's vector and those of its features (the mean of a feature's categories), which
    without features is matrix factorisation, or a perceptron over all of them beside each other.

    Args:
        users: rows and features.
        items: rows and features.
        dim: of all vectors.
        scoring: how users and items are compared, and the loss.
        dtype: storage of the tables.
        optimizers: by table, the `TableSpec.optimizer` of those that do not share the others'.
        options: see `EmbeddingCollection`; the seed is also that of the dense part.

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
        # A mean over the global batch, whatever share of it this rank has: the exchange averages over the ranks.
        return total * (self.tables.ranks.size / max(1, batch.num_global_positives))

    def _with_uniformity(
        self, aligned: Tensor, batch: RetrievalBatch, users: Tensor, own: Tensor, candidates: Tensor
    ) -> Objective:
        """Returns the loss of aligned pairs [m] and the uniformity of the step's users and candidates.

        Collective: every rank, and its backward too. Each rank compares its own vectors with those of all ranks.
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
        # The gradient of the logarithm of a sum over the ranks, whose parts the exchange averages over the ranks.
        gradient = (potentials / totals.float()).sum() * (weight * ranks.size)
        num_pairs = [max(1, len(every) * (len(every) - 1)) for _, every, _ in sides]
        uniformity = weight * (totals.log().sum() - sum(map(math.log, num_pairs)))
        total = aligned.sum()
        loss = self._mean(total, batch) + gradient
        return Objective(loss, total.detach().double() + aligned.numel() * uniformity, aligned.numel())

    def encode(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the vectors of rows [n] of each side, [n, dim], as they are compared.

        Collective: every rank, with the same sides.
        """
        return self._encode(rows, self._ask(rows, is_ahead=False))

    def encode_described(self, name: str, id_vector: Tensor, features: Mapping[str, Jagged], num_rows: int) -> Tensor:
        """Returns the vectors [num_rows, dim] of users or items that have features and no row. Collective: every rank.

        Args:
            name: the side.
            id_vector: [dim], what stands for the vector of their ids.
            features: by name, the categories of each.
            num_rows: how many there are.
        """
        vectors = self.tables.look_up(self.tables.ask({f"{name}.{key}": bags for key, bags in features.items()}))
        return self._join(name, {**vectors, name: id_vector.expand(num_rows, -1)})

    def prepare(self, batch: RetrievalBatch, *, is_ahead: bool = True) -> PreparedPairs:
        """Exchanges the ids of a step, for `forward` later. Collective: every rank, in order of steps."""
        rows = {USER: batch.users, ITEM: torch.cat([batch.positives, batch.negatives])}
        pairs = pairs_of(batch, self.scoring, self.tables.device)
        return PreparedPairs(batch, pairs, self._ask(rows, is_ahead=is_ahead))

    def bring_rows(self, prepared: PreparedPairs) -> None:
        """Copies rows of a step that live in host memory to the device."""
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
        """Returns vectors [n, dim] of a side as dot products compare them: of length 1 if it is normalised."""
        return F.normalize(vectors, dim=1) if self.scoring.is_unit(name) else vectors


def pairs_of(batch: RetrievalBatch, scoring: Scoring, device: torch.device) -> Pairs:
    """Returns who is compared with whom, on a device."""
    corrections = None
    if scoring.loss in SOFTMAXES and scoring.logq:
        of_positives, of_candidates = batch.expected
        corrections = to_device(of_positives, device).log(), to_device(of_candidates, device).log()
    rows, columns = _known_among(batch.known, batch.candidates)
    return Pairs(to_device(batch.example, device), corrections, (to_device(rows, device), to_device(columns, device)))


def pair_losses(pairs: Pairs, scoring: Scoring, users: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """Returns the loss of each positive of a batch; [m].

    Args:
        pairs: who is compared with whom.
        scoring: the loss.
        users: [n, dim]; the vectors of the batch's users, and so on.
        positives: [m, dim].
        candidates: [c, dim]; the candidates of all ranks.
    """
    example = pairs.example
    if scoring.loss != "cosine_contrastive":
        users = users / scoring.temperature  # as the scores would be, but of far fewer numbers
    positive, correction = (users[example] * positives).sum(dim=1), None
    if pairs.corrections is not None:
        of_positives, of_candidates = pairs.corrections
        correction = -of_candidates
        if scoring.loss == "softmax":  # whose positive is one of the sum's terms
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
    """Returns the users and the candidates, by place, of each candidate that a user is known to have.

    Args:
        known: the candidates that the users have.
        candidates: [c] int64; may repeat.
    """
    in_order, place = candidates.sort()
    first = torch.searchsorted(in_order, known.values)
    times = torch.searchsorted(in_order, known.values, right=True) - first
    return torch.repeat_interleave(known.bag_of_values(), times), place[places_of_runs(first, times)]


def perceptron(size: int, hidden: Sequence[int], dim: int) -> nn.Sequential:
    """Returns the layers of a tower: from `size` numbers by the hidden sizes to a vector of `dim`."""
    layers: list[nn.Module] = []
    for wide in hidden:
        layers += [nn.Linear(size, wide), nn.ReLU()]
        size = wide
    return nn.Sequential(*layers, nn.Linear(size, dim))
