"""Retrieval: matrix factorisation and two towers, on sharded tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

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
from embedtrain.recipes.retrieval.config import USER as USER
from embedtrain.spec import DEFAULT_OPTIMIZER, FeatureSpec, TableSpec
from embedtrain.train.task import Objective

if TYPE_CHECKING:
    from typing_extensions import Unpack


Similarity = Literal["cosine", "dot"]

_INIT_SCALES = {"cosine": 0.1, "dot": 0.01}
"""Standard deviation of first values: dot products begin near 0; of a cosine only the direction counts."""


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
    """How a user and an item are compared, and what for.

    Attributes:
        loss: "softmax", "bpr" or "margin"; see `embedtrain.recipes.retrieval.losses`.
        similarity: "cosine" or "dot".
        temperature: softmax and BPR see the similarities divided by it.
        logq: whether softmax corrects for how often each item comes up as a negative.
        margin: of the margin loss.
        negative_weight: of the margin loss.
    """

    loss: Literal["softmax", "bpr", "margin"] = "softmax"
    similarity: Similarity = "cosine"
    temperature: float = 0.1
    logq: bool = True
    margin: float = 0.5
    negative_weight: float = 100.0


def retrieval_table(
    name: str, num_rows: int, dim: int, dtype: torch.dtype, similarity: Similarity, optimizer: str = DEFAULT_OPTIMIZER
) -> TableSpec:
    """Returns a table of ids, or of the categories of a feature; one of no rows gets one that nobody asks for."""
    return TableSpec(name, max(1, num_rows), dim, dtype, "normal", _INIT_SCALES[similarity], optimizer)


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
    """A vector for each user and item; their similarity says which items a user will turn to.

    A side is the sum of its id's vector and those of its features (the mean of a feature's categories), which
    without features is matrix factorisation, or a perceptron over all of them beside each other.

    Args:
        users: rows and features.
        items: rows and features.
        dim: of all vectors.
        scoring: similarity and loss.
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
        tables, features = [], []
        for name, side in self.sides.items():
            sizes = {name: side.num_rows, **{f"{name}.{f}": n for f, (_, n) in side.features.items()}}
            for table, rows in sizes.items():
                own = (optimizers or {}).get(table, DEFAULT_OPTIMIZER)
                tables.append(retrieval_table(table, rows, dim, dtype, scoring.similarity, own))
            features += [FeatureSpec(table, pooling="none" if table == name else "mean") for table in sizes]
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
        per_pair = pair_losses(prepared.pairs, self.scoring, users, items[:num_positives], candidates)
        total = per_pair.sum()
        # A mean over the global batch, whatever share of it this rank has: the exchange averages over the ranks.
        loss = total * (self.tables.ranks.size / max(1, batch.num_global_positives))
        return Objective(loss, total.detach().double(), num_positives)

    def encode(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the vectors of rows [n] of each side, [n, dim], of length 1 if the similarity is a cosine.

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
        return self.as_compared(joined)

    def as_compared(self, vectors: Tensor) -> Tensor:
        """Returns vectors [n, dim] as their dot products compare them: of length 1 if the similarity is a cosine."""
        return F.normalize(vectors, dim=1) if self.scoring.similarity == "cosine" else vectors


def pairs_of(batch: RetrievalBatch, scoring: Scoring, device: torch.device) -> Pairs:
    """Returns who is compared with whom, on a device."""
    corrections = None
    if scoring.loss == "softmax" and scoring.logq:
        of_positives, of_candidates = batch.expected
        corrections = to_device(of_positives, device).log(), to_device(of_candidates, device).log()
    rows, columns = _known_among(batch.known, batch.candidates)
    return Pairs(to_device(batch.example, device), corrections, (to_device(rows, device), to_device(columns, device)))


def pair_losses(pairs: Pairs, scoring: Scoring, users: Tensor, positives: Tensor, candidates: Tensor) -> Tensor:
    """Returns the loss of each positive of a batch; [m].

    Args:
        pairs: who is compared with whom.
        scoring: similarity and loss.
        users: [n, dim]; the vectors of the batch's users, and so on.
        positives: [m, dim].
        candidates: [c, dim]; the candidates of all ranks.
    """
    example = pairs.example
    if scoring.loss != "margin":
        users = users / scoring.temperature  # as the scores would be, but of far fewer numbers
    positive, correction = (users[example] * positives).sum(dim=1), None
    if pairs.corrections is not None:
        of_positives, of_candidates = pairs.corrections
        positive, correction = positive - of_positives, -of_candidates
    scores = _scores(users, candidates, correction)
    # The number is made on the device: for a copy of one the host would wait.
    negative = scores.index_put_(pairs.known, torch.full((), losses.NOT_A_NEGATIVE, device=scores.device))
    if scoring.loss == "softmax":
        return losses.softmax_loss(positive, example, negative)
    if scoring.loss == "bpr":
        return losses.bpr_loss(positive, example, negative)
    return losses.margin_loss(positive, example, negative, margin=scoring.margin, weight=scoring.negative_weight)


def _scores(users: Tensor, candidates: Tensor, correction: Tensor | None) -> Tensor:
    """Returns the scores of users [n, dim] for candidates [c, dim], [n, c] float32, plus a correction [c]."""
    if not torch.is_autocast_enabled(users.device.type):
        return F.linear(users, candidates, correction)
    # The product takes the correction in its own dtype, which would round away more of it than of the product.
    scores = F.linear(users, candidates).float()
    return scores if correction is None else scores.add_(correction)


def _known_among(known: Jagged, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the users and the candidates, by place, of each candidate that a user is known to have.

    Args:
        known: the items of the users.
        candidates: [c] int64; may repeat.
    """
    in_order, place = candidates.sort()
    first = torch.searchsorted(in_order, known.values)
    # Few of the items that are known are among the candidates: the others are left out first.
    (among,) = torch.nonzero(in_order[first.clamp(max=len(in_order) - 1)] == known.values, as_tuple=True)
    first = first[among]
    times = torch.searchsorted(in_order, known.values[among], right=True) - first
    return torch.repeat_interleave(known.bag_of_values()[among], times), place[places_of_runs(first, times)]


def perceptron(size: int, hidden: Sequence[int], dim: int) -> nn.Sequential:
    """Returns the layers of a tower: from `size` numbers by the hidden sizes to a vector of `dim`."""
    layers: list[nn.Module] = []
    for wide in hidden:
        layers += [nn.Linear(size, wide), nn.ReLU()]
        size = wide
    return nn.Sequential(*layers, nn.Linear(size, dim))
