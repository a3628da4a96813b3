"""Every interaction once an epoch, the same steps for every number of ranks, draws as asked for."""

from __future__ import annotations

import numpy as np
import pytest

from embedtrain.data.bags import Bags
from embedtrain.data.retrieval_batches import DrawOptions, RetrievalBatch, RetrievalBatches

NUM_USERS, NUM_ITEMS = 40, 25


@pytest.fixture(scope="module")
def known() -> Bags:
    generator = np.random.default_rng(0)
    keys = np.unique(generator.integers(NUM_USERS * NUM_ITEMS, size=300))
    return Bags.from_rows(keys // NUM_ITEMS, keys % NUM_ITEMS, NUM_USERS)


def batches_of(known: Bags, world_size: int = 1, **options: object) -> list[RetrievalBatches]:
    draw = DrawOptions(**{"global_batch_size": 7, "items_per_example": 3, "num_negatives": 10, **options})
    return [
        RetrievalBatches(known, NUM_ITEMS, draw, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)
    ]


@pytest.mark.parametrize("items_per_example", [1, 3, 1000])
def test_an_epoch_has_every_interaction_once(known: Bags, items_per_example: int) -> None:
    (batches,) = batches_of(known, items_per_example=items_per_example)
    orders = []
    for epoch in (0, 1):
        pairs = []
        for step in range(batches.steps_per_epoch):
            batch = batches.batch(epoch, step)
            lengths = np.bincount(batch.example, minlength=len(batch.users))
            assert lengths.min() >= 1 and lengths.max() <= items_per_example
            pairs += (batch.users[batch.example] * NUM_ITEMS + batch.positives).tolist()
        assert sorted(pairs) == (known.rows() * NUM_ITEMS + known.values).tolist()
        assert len(pairs) == batches.examples_per_epoch
        orders.append(pairs)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("in_batch", [False, True])
def test_ranks_share_the_steps_of_one(known: Bags, in_batch: bool) -> None:
    (alone,), several = batches_of(known, in_batch=in_batch), batches_of(known, 3, in_batch=in_batch)
    for step in (0, alone.steps_per_epoch - 1):
        whole, parts = alone.batch(2, step), [batches.batch(2, step) for batches in several]
        for name in ("users", "positives", "negatives"):
            assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(whole, name).tolist()
        for part in parts:
            assert part.candidates.sort()[0].tolist() == whole.candidates.sort()[0].tolist()
            assert part.user_counts == [len(each.users) for each in parts]
            assert part.num_global_positives == whole.num_global_positives == whole.num_examples
        first = 0
        for part, count in zip(parts, parts[0].candidate_counts, strict=True):
            own = [*part.positives.tolist(), *part.negatives.tolist()] if in_batch else part.negatives.tolist()
            assert part.candidates[first : first + count].tolist() == own
            first += count


def test_negatives_are_drawn_uniformly_and_by_popularity(known: Bags) -> None:
    counts = np.bincount(known.values, minlength=NUM_ITEMS)
    for share in (0.0, 0.3, 1.0):
        (batches,) = batches_of(known, num_negatives=20_000, popularity_share=share)
        batch = batches.batch(0, 0)
        drawn = np.bincount(batch.negatives, minlength=NUM_ITEMS) / 20_000
        expected = share * counts / counts.sum() + (1 - share) / NUM_ITEMS
        np.testing.assert_allclose(drawn, expected, atol=0.01)
        np.testing.assert_allclose(batch.expected[1], 20_000 * expected[batch.candidates], rtol=1e-5)


def test_a_batch_is_a_function_of_epoch_and_step(known: Bags) -> None:
    (one,), (other,) = batches_of(known), batches_of(known)
    for step in range(3):
        other.batch(0, step)
    first, second = one.batch(1, 2), other.batch(1, 2)
    for name in ("users", "positives", "negatives", "candidates"):
        assert getattr(first, name).tolist() == getattr(second, name).tolist()


def test_a_user_of_very_many_items_costs_a_step_no_more_than_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    num_items = 3000
    many = np.arange(0, num_items, 2)
    known = Bags.from_rows(np.repeat([0, 1, 2], [len(many), 3, 1]), np.concatenate([many, [1, 5, 2999], [7]]), 3)
    draw = DrawOptions(global_batch_size=64, items_per_example=2, num_negatives=50, in_batch=True)

    def step() -> RetrievalBatch:
        return RetrievalBatches(known, num_items, draw, seed=5).batch(0, 3)

    whole = step()
    monkeypatch.setattr("embedtrain.data.retrieval_batches.MANY_KNOWN", 1000)
    bounded = step()
    candidates = set(whole.candidates.tolist())
    for batch in (whole, bounded):
        bags = batch.known.values.split(batch.known.lengths.tolist())
        for user, found in zip(batch.users.tolist(), bags, strict=True):
            own = known.values[known.starts[user] : known.starts[user + 1]].tolist()
            assert found.tolist() == [item for item in own if item in candidates]
