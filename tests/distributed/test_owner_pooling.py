"""Bags pooled at the owners of their rows: the same results as at the examples, for fewer bytes where bags are long."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.testing.threads import run_threads

STEPS = 4
TABLES = [
    et.TableSpec("word", num_rows=101, dim=8),
    et.TableSpec("tiny", num_rows=2, dim=8),  # fewer rows than ranks
    et.TableSpec("item", num_rows=33, dim=5),
]
ROWS = {"history": 101, "weighted": 101, "both": 101, "tiny": 2, "item": 40, "hashed": 60}


def features(pool_at: str) -> list[et.FeatureSpec]:
    return [
        et.FeatureSpec("history", "word", pooling="mean", pool_at=pool_at),
        et.FeatureSpec("weighted", "word", pooling="sum", pool_at=pool_at),
        et.FeatureSpec("both", "word", pooling="mean", pool_at=pool_at),
        et.FeatureSpec("tiny", pooling="sum", pool_at=pool_at),
        et.FeatureSpec("item", pooling="mean", invalid_ids="drop", pool_at=pool_at),
        et.FeatureSpec("hashed", "item", pooling="sum", invalid_ids="hash", pool_at=pool_at),
    ]


def mixed(_: str) -> list[et.FeatureSpec]:
    ways = ["owner", "example", "owner", "auto", "owner", "example"]
    named = zip(features("auto"), ways, strict=True)
    pooled = [et.FeatureSpec(f.name, f.table, f.pooling, f.invalid_ids, pool_at=way) for f, way in named]
    return [*pooled, et.FeatureSpec("word")]


def make_batch(step: int, rank: int, names: list[str]) -> dict[str, et.Jagged]:
    """Ids repeat within bags, over bags and over ranks; bags and, in step 2 on rank 1, the batch may be empty."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    num_bags = 0 if (step, rank) == (2, 1) else 5 + rank
    batch = {}
    for name in names:
        lengths = torch.randint(0, 9, (num_bags,), generator=generator)
        draws = torch.rand(2, int(lengths.sum()), generator=generator).prod(dim=0)
        is_weighted = name in ("weighted", "both") and (name, rank) != ("both", 0)
        weights = torch.rand(draws.numel(), generator=generator) if is_weighted else None
        batch[name] = et.Jagged((draws * ROWS.get(name, 101)).long(), lengths, weights)
    return batch


def train(ranks: Ranks, specs: list[et.FeatureSpec]) -> tuple[list[torch.Tensor], dict[str, Any]]:
    rank = ranks.rank
    tables = et.EmbeddingCollection(TABLES, specs, ranks=ranks, seed=11)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    pooled = []
    for step in range(STEPS):
        vectors = tables(make_batch(step, rank, [spec.name for spec in specs]))
        pooled += [each.detach().clone() for each in vectors.values()]
        sum(((v - 0.1 * i) ** 2).sum() + v.sin().sum() for i, v in enumerate(vectors.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    states = [(table.name, state) for table in TABLES for state in ("weight", "accumulator")]
    return pooled, {f"{name}/{state}": tables.gather_table(name, state) for name, state in states}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_vectors_weights_and_accumulators_are_the_same_both_ways(world_size: int) -> None:
    expected = run_threads(world_size, train, features("example"))
    for pool_at in ("owner", "auto"):
        for found, reference in zip(run_threads(world_size, train, features(pool_at)), expected, strict=True):
            # Sums in another order: a few float32 roundings a step.
            torch.testing.assert_close(found, reference, rtol=2e-6, atol=2e-6)


def test_features_of_one_group_may_be_pooled_in_different_places() -> None:
    specs = mixed("")
    expected = [et.FeatureSpec(f.name, f.table, f.pooling, f.invalid_ids, pool_at="example") for f in specs]
    for found, reference in zip(run_threads(3, train, specs), run_threads(3, train, expected), strict=True):
        torch.testing.assert_close(found, reference, rtol=2e-6, atol=2e-6)


def test_the_same_run_twice_is_bit_for_bit_the_same() -> None:
    first, second = (run_threads(3, train, features("auto")) for _ in range(2))
    for (_, of_first), (_, of_second) in zip(first, second, strict=True):
        assert all(torch.equal(of_first[name], of_second[name]) for name in of_first)


def test_rows_in_bfloat16_are_added_up_in_float32() -> None:
    found, expected = (run_threads(2, pool_bfloat16, pool_at) for pool_at in ("owner", "example"))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def pool_bfloat16(ranks: Ranks, pool_at: str) -> torch.Tensor:
    table = et.TableSpec("word", 101, 8, dtype=torch.bfloat16)
    tables = et.EmbeddingCollection([table], [et.FeatureSpec("word", pooling="sum", pool_at=pool_at)], ranks=ranks)
    return tables({"word": make_batch(0, ranks.rank, ["word"])["word"]})["word"].detach()


def count_collectives(ranks: Ranks, ways: list[str], length: int) -> list[int]:
    """Returns how many all-to-alls a look-up of 26 features and its backward take, one of them of counts."""
    specs = [et.FeatureSpec(f"f{i}", f"t{i % 5}", pooling="sum", pool_at=ways[i % len(ways)]) for i in range(26)]
    tables = et.EmbeddingCollection([et.TableSpec(f"t{i}", 50 + i, 8) for i in range(5)], specs, ranks=ranks)
    calls: Counter[str] = Counter()
    original = ranks.all_to_all

    def counted(*arguments: Any) -> torch.Tensor:
        calls[phase] += 1
        return original(*arguments)

    ranks.all_to_all = counted
    bags = et.Jagged(torch.arange(4 * length) % 50, torch.full((4,), length))
    for phase in ("forward", "backward"):
        if phase == "forward":
            vectors = tables({spec.name: bags for spec in specs})
        else:
            sum(each.sum() for each in vectors.values()).backward()
    return [calls["forward"], calls["backward"]]


@pytest.mark.parametrize(
    ("ways", "length", "expected"),
    [
        # Counts, ids and vectors; then gradients.
        (["example"], 3, [3, 1]),
        (["owner"], 3, [3, 1]),
        (["auto"], 1, [3, 1]),
        # Ids, vectors and gradients of each way.
        (["example", "owner"], 3, [5, 2]),
    ],
)
def test_26_features_cost_one_exchange_of_each_kind(ways: list[str], length: int, expected: list[int]) -> None:
    # Through memory the same rows travel by other calls.
    assert run_threads(2, count_collectives, ways, length) == [expected] * 2


def chosen_ways(ranks: Ranks) -> list[list[bool]]:
    """Two features at once: few long bags of many distinct ids, and bags of few distinct ones."""
    tables = et.EmbeddingCollection(
        [et.TableSpec("word", 100_000, 16)],
        [et.FeatureSpec("long", "word", "sum"), et.FeatureSpec("hot", "word", "sum"), et.FeatureSpec("one", "word")],
        ranks=ranks,
    )
    ids = torch.arange(6000) * 7919 % 100_000
    batch = {
        "long": et.Jagged(ids, torch.full((60,), 100)),
        "hot": et.Jagged(ids % 20, torch.full((60,), 100)),
        "one": et.Jagged(ids, torch.ones(6000, dtype=torch.int64)),
    }
    return [list(part.at_owner) for part in tables.ask(batch).parts]


def test_long_bags_of_distinct_ids_are_pooled_at_the_owner_and_hot_ones_at_the_example() -> None:
    assert run_threads(2, chosen_ways) == [[[True, False, False]]] * 2


def weigh_by_a_parameter(ranks: Ranks, pool_at: str) -> torch.Tensor | str:
    tables = et.EmbeddingCollection(
        [et.TableSpec("word", 500, 4)], [et.FeatureSpec("word", pooling="sum", pool_at=pool_at)], ranks=ranks
    )
    # Rank 1 alone has weights that learn.
    learns = ranks.rank == 1
    weights = torch.ones(400, requires_grad=learns)
    bags = et.Jagged(torch.arange(400), torch.tensor([400]), weights)
    try:
        tables({"word": bags})["word"].sum().backward()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return weights.grad.sum() if learns else torch.zeros(())


def test_weights_that_learn_are_pooled_where_their_rows_can_come_to() -> None:
    expected = run_threads(2, weigh_by_a_parameter, "example")
    torch.testing.assert_close(run_threads(2, weigh_by_a_parameter, "auto"), expected)
    for text in run_threads(2, weigh_by_a_parameter, "owner"):
        assert "feature 'word': the gradient of its weights needs the rows" in text
