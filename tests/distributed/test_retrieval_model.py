"""Retrieval: its loss against the formula, its lists against a full sort, and any number of ranks against one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import embedtrain as et
from embedtrain.data.bags import Bags
from embedtrain.data.retrieval_batches import DrawOptions, RetrievalBatch, RetrievalBatches
from embedtrain.distributed.ranks import ONE_PROCESS, Ranks
from embedtrain.metrics.ranking import hits_of, list_measures, mean_measures
from embedtrain.optim.dense import DenseOptimizer
from embedtrain.recipes import catalogue
from embedtrain.recipes import lists as recipe_lists
from embedtrain.recipes.retrieval.model import Retrieval, Scoring, Side
from embedtrain.recipes.retrieval.recommendation import all_vectors, catalogue_of, evaluate_retrieval, user_vectors
from embedtrain.testing.threads import run_threads
from embedtrain.train.step import train_step

NUM_USERS, NUM_ITEMS, DIM = 33, 50, 6


def random_bags(num_rows: int, num_values: int, size: int, seed: int) -> Bags:
    keys = np.unique(np.random.default_rng(seed).integers(num_rows * num_values, size=size))
    return Bags.from_rows(keys // num_values, keys % num_values, num_rows)


KNOWN = random_bags(NUM_USERS, NUM_ITEMS, 300, seed=1)
HELD_OUT = random_bags(NUM_USERS, NUM_ITEMS, 60, seed=2)


def make(scoring: Scoring, towers: bool = False, ranks: Ranks = ONE_PROCESS) -> Retrieval:
    users, items = Side(NUM_USERS), Side(NUM_ITEMS)
    if towers:
        users = Side(NUM_USERS, {"age": (random_bags(NUM_USERS, 4, 30, seed=3), 4)}, hidden=[8])
        genres = random_bags(NUM_ITEMS, 5, 90, seed=4)
        items = Side(NUM_ITEMS, {"genre": (genres, 5), "maker": (random_bags(NUM_ITEMS, 9, 40, seed=5), 9)})
    return Retrieval(users, items, DIM, scoring, ranks=ranks, seed=7)


def batches_of(ranks: Ranks = ONE_PROCESS, **options: object) -> RetrievalBatches:
    draw = DrawOptions(**{"global_batch_size": 11, "items_per_example": 4, "num_negatives": 13, **options})
    return RetrievalBatches(KNOWN, NUM_ITEMS, draw, seed=3, rank=ranks.rank, world_size=ranks.size)


@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("normalize", ["none", "users", "items", "both"])
def test_the_loss_is_the_corrected_softmax_over_the_candidates(in_batch: bool, normalize: Any) -> None:
    model = make(Scoring(loss="softmax", normalize=normalize, temperature=0.3))
    batch = batches_of(in_batch=in_batch, popularity_share=0.5).batch(0, 0)
    users, items = (model.tables.gather_table(side) for side in ("user", "item"))
    users = (F.normalize(users, dim=1) if normalize in ("users", "both") else users)[batch.users]
    items = F.normalize(items, dim=1) if normalize in ("items", "both") else items
    expected = 0.0
    of_positive, of_candidate = batch.expected
    for place, (row, item) in enumerate(zip(batch.example.tolist(), batch.positives.tolist(), strict=True)):
        user = int(batch.users[row])
        mine = set(KNOWN.of(np.array([user]))[0].tolist())
        target = users[row] @ items[item] / 0.3 - of_positive[place].log()
        others = [
            users[row] @ items[c] / 0.3 - of_candidate[at].log()
            for at, c in enumerate(batch.candidates.tolist())
            if c not in mine
        ]
        expected += float(torch.logsumexp(torch.stack([target, *others]), 0) - target)
    objective = model(batch)
    assert float(objective.total) == pytest.approx(expected, rel=1e-5)
    assert float(objective.loss.detach()) == pytest.approx(expected / batch.num_examples, rel=1e-5)


def test_vectors_begin_with_length_1_and_ids_with_features_near_0() -> None:
    def lengths(model: Retrieval, name: str) -> float:
        return float(model.tables.gather_table(name).norm(dim=1).mean())

    plain, described, dots = make(Scoring()), make(Scoring(), towers=True), make(Scoring(normalize="users"))
    assert lengths(plain, "user") == pytest.approx(1, rel=0.2)
    assert lengths(described, "item.genre") == pytest.approx(1, rel=0.5)
    assert lengths(described, "item") < 0.1
    assert lengths(dots, "item") < 0.1 < lengths(dots, "user")


def plain_loss(users: Tensor, items: Tensor, batch: RetrievalBatch, scoring: Scoring) -> Tensor:
    """Returns the mean loss of a batch of one rank by the formulas as published, from the tables of vectors."""
    users, items = F.normalize(users, dim=1)[batch.users], F.normalize(items, dim=1)
    positives, candidates = items[batch.positives], items[batch.candidates]
    align = (users[batch.example] - positives).pow(2).sum(dim=1)
    if scoring.loss == "alignment_uniformity":
        uniform = [torch.pdist(side).pow(2).mul(-2).exp().mean().log() for side in (users, candidates)]
        return align.mean() + scoring.negative_weight * sum(uniform) / 2
    known = torch.zeros(len(batch.users), NUM_ITEMS, dtype=torch.bool)
    known[batch.known.bag_of_values(), batch.known.values] = True
    positive = 1 - align / 2
    scores = users @ candidates.T
    costs = []
    for place, row in enumerate(batch.example.tolist()):
        is_negative = ~known[row, batch.candidates]
        own = scores[row, is_negative]
        if scoring.loss == "cosine_contrastive":
            cost = 1 - positive[place] + scoring.negative_weight * F.relu(own - scoring.margin).mean()
        elif scoring.loss == "bpr":
            cost = -F.logsigmoid((positive[place] - own) / scoring.temperature).mean()
        else:
            logits = own / scoring.temperature - batch.expected[1][is_negative].log()
            if scoring.hard_negatives is not None:
                logits = logits.sort(descending=True).values[: scoring.hard_negatives]
            cost = scoring.negative_weight * logits.exp().sum().log() - positive[place] / scoring.temperature
        costs.append(cost)
    return torch.stack(costs).mean()


LOSSES = [
    Scoring(loss="bilateral_softmax", negative_weight=1.2, temperature=0.3),
    Scoring(loss="bilateral_softmax", negative_weight=1.2, temperature=0.3, hard_negatives=4),
    Scoring(loss="cosine_contrastive", negative_weight=30.0, margin=0.1),
    Scoring(loss="bpr", temperature=0.3),
    Scoring(loss="alignment_uniformity", negative_weight=0.7),
]


@pytest.mark.parametrize("scoring", LOSSES, ids=str)
@pytest.mark.parametrize("num_negatives", [0, 13])
def test_a_loss_and_its_gradient_are_those_of_plain_pytorch(scoring: Scoring, num_negatives: int) -> None:
    model, batch = make(scoring), batches_of(in_batch=True, num_negatives=num_negatives).batch(0, 0)
    tables = [model.tables.gather_table(side).double().requires_grad_() for side in ("user", "item")]
    expected = plain_loss(*tables, batch, scoring)
    expected.backward()
    objective = model(batch)
    assert float(objective.total) / batch.num_examples == pytest.approx(expected.item(), rel=1e-4)
    objective.loss.backward()
    # A step of SGD with a rate of 1 takes the gradient from the rows.
    et.optim.SGD(model.tables, lr=1.0).step()
    for side, table in zip(("user", "item"), tables, strict=True):
        moved = table.detach() - model.tables.gather_table(side).double()
        torch.testing.assert_close(moved, table.grad, rtol=1e-3, atol=1e-5)


def test_losses_of_cosines_refuse_other_vectors() -> None:
    with pytest.raises(ValueError, match="normalize must be 'both', got 'items'"):
        Scoring(loss="alignment_uniformity", normalize="items")


def train(ranks: Ranks, scoring: Scoring, towers: bool, in_batch: bool) -> dict[str, Tensor]:
    model = make(scoring, towers, ranks)
    optimizer = et.optim.RowwiseAdagrad(model.tables, lr=0.1, max_norm=1.0)
    dense = DenseOptimizer(model.dense, ranks=ranks, lr=0.01) if towers else None
    batches = batches_of(ranks, in_batch=in_batch)
    for step in range(batches.steps_per_epoch):
        train_step(model, optimizer, batches.batch(0, step), dense)
    tables = {name: model.tables.gather_table(name) for name in model.tables.shards}
    states = {f"{name}/acc": model.tables.gather_table(name, "accumulator") for name in model.tables.shards}
    measures = evaluate_retrieval(model, KNOWN, HELD_OUT, [3, 10], lambda: None)
    measured = {name: torch.tensor(value) for name, value in measures.items()}
    return {**tables, **states, **measured, **(dense.tensors() if dense is not None else {})}


@pytest.mark.parametrize(
    ("scoring", "towers", "in_batch"),
    [
        (Scoring(loss="softmax"), True, True),
        (Scoring(loss="bpr", normalize="none", temperature=1.0), False, False),
        (Scoring(loss="softmax", normalize="items"), False, True),
        (Scoring(loss="cosine_contrastive", hard_negatives=5), True, False),
        *((scoring, False, True) for scoring in LOSSES),
    ],
    ids=str,
)
def test_ranks_train_and_measure_as_one_process(scoring: Scoring, towers: bool, in_batch: bool) -> None:
    expected = train(ONE_PROCESS, scoring, towers, in_batch)
    for found in (*run_threads(2, train, scoring, towers, in_batch), *run_threads(3, train, scoring, towers, in_batch)):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def best_by_sorting(model: Retrieval, users: np.ndarray, k: int) -> Tensor:
    scores = all_vectors(model, "user")[users] @ all_vectors(model, "item").T
    for row, user in enumerate(users.tolist()):
        scores[row, KNOWN.of(np.array([user]))[0]] = -torch.inf
    return scores.argsort(dim=1, descending=True)[:, :k]


@pytest.mark.parametrize("towers", [False, True])
def test_lists_are_those_of_a_full_sort(towers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "_ITEMS_AT_ONCE", 7)
    model = make(Scoring(), towers)
    users = np.array([5, 0, 32, 17])
    items, scores = catalogue_of(model).best(users, 9, KNOWN, user_vectors(model, users))
    assert torch.equal(items, best_by_sorting(model, users, 9))
    assert (scores.diff(dim=1) <= 0).all()
    every, _ = catalogue_of(model).best(users, 1000, KNOWN, user_vectors(model, users))
    assert every.shape == (4, NUM_ITEMS)
    assert (every == -1).sum(dim=1).tolist() == KNOWN.lengths(users).tolist()


def test_measures_are_those_of_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe_lists, "_USERS_AT_ONCE", 5)
    model = make(Scoring())
    users = np.flatnonzero(np.diff(HELD_OUT.starts))
    lists = best_by_sorting(model, users, 10)
    relevant, lengths = map(torch.from_numpy, HELD_OUT.of(users))
    hits = hits_of(lists, torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), relevant, NUM_ITEMS)
    expected = mean_measures(list_measures(hits, lengths, 10).unsqueeze(0), len(users), [10])
    found = evaluate_retrieval(model, KNOWN, HELD_OUT, [10], lambda: None)
    assert found.pop("item_coverage@10") == len(lists.unique()) / NUM_ITEMS
    assert found == pytest.approx(expected)
