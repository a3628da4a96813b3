"""The central promise: rows and optimizer state do not depend on how many ranks share them."""

from __future__ import annotations

import pytest
import torch

import embedtrain as et
from embedtrain.distributed.ranks import Ranks
from embedtrain.distributed.shared_memory import VARIABLE
from embedtrain.testing.ranks import run_ranks
from embedtrain.testing.threads import run_threads

STEPS = 6

TABLES = [
    et.TableSpec("word", num_rows=101, dim=8),
    et.TableSpec("user", num_rows=7, dim=8, init="normal", init_scale=0.5),
    et.TableSpec("tiny", num_rows=2, dim=8),  # fewer rows than ranks
    et.TableSpec("item", num_rows=33, dim=5),
    et.TableSpec("url", num_rows=131_085, dim=8),  # large enough for ids to keep their neighbours
]
FEATURES = [
    et.FeatureSpec("word"),
    et.FeatureSpec("history", "word", pooling="mean"),
    et.FeatureSpec("weighted", "word", pooling="sum"),
    et.FeatureSpec("user"),
    et.FeatureSpec("tiny", pooling="sum"),
    et.FeatureSpec("item", pooling="mean", invalid_ids="drop"),
    et.FeatureSpec("hashed", "item", pooling="sum", invalid_ids="hash"),
    et.FeatureSpec("url", pooling="sum"),
]
OPTIMIZERS = {
    "plain": {"lr": 0.1},
    "options": {
        "lr": 0.1,
        "eps": 1e-6,
        "initial_accumulator_value": 0.2,
        "lr_decay": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 0.5,
    },
    "decoupled": {"lr": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
}


def make_batch(step: int, rank: int) -> dict[str, et.Jagged]:
    """Ids repeat within a bag and across ranks; some bags are empty, and rank 1's batch is in step 2."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    num_bags = 0 if (step, rank) == (2, 1) else 3 + rank
    rows = {
        "word": 101,
        "history": 101,
        "weighted": 101,
        "user": 7,
        "tiny": 2,
        "item": 40,
        "hashed": 60,
        "url": 131_085,
    }
    batch = {}
    for name, num_rows in rows.items():
        lengths = torch.randint(0, 5, (num_bags,), generator=generator)
        # The product of two draws favours low ids, as real data do.
        draws = torch.rand(2, int(lengths.sum()), generator=generator).prod(dim=0)
        weights = torch.rand(draws.numel(), generator=generator) if name == "weighted" else None
        batch[name] = et.Jagged((draws * num_rows).long(), lengths, weights)
    return batch


def loss_of(vectors: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(((v - 0.1 * i) ** 2).sum() + v.sin().sum() for i, v in enumerate(vectors.values(), start=1))


def train_sharded(ranks: Ranks, dtype: torch.dtype, options: dict) -> dict[str, torch.Tensor]:
    rank = ranks.rank
    tables = et.EmbeddingCollection(with_dtype(dtype), FEATURES, ranks=ranks, seed=11)
    optimizer = et.optim.RowwiseAdagrad(tables, **options)
    for step in range(STEPS):
        loss_of(tables(make_batch(step, rank))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return all_tensors(tables)


def train_unsharded(world_size: int, dtype: torch.dtype, options: dict) -> dict[str, torch.Tensor]:
    tables = et.UnshardedEmbeddingCollection(with_dtype(dtype), FEATURES, seed=11)
    optimizer = et.optim.RowwiseAdagrad(tables, **options)
    for step in range(STEPS):
        losses = [loss_of(tables(make_batch(step, rank))) for rank in range(world_size)]
        (sum(losses) / world_size).backward()
        optimizer.step()
        optimizer.zero_grad()
    return all_tensors(tables)


def with_dtype(dtype: torch.dtype) -> list[et.TableSpec]:
    return [et.TableSpec(t.name, t.num_rows, t.dim, dtype=dtype, init=t.init, init_scale=t.init_scale) for t in TABLES]


def all_tensors(tables: et.EmbeddingCollection | et.UnshardedEmbeddingCollection) -> dict[str, torch.Tensor]:
    return {
        f"{table.name}/{state}": tables.gather_table(table.name, state)
        for table in TABLES
        for state in ("weight", "accumulator")
    }


def assert_equal_the_oracle(ranks: list[dict[str, torch.Tensor]], options: str) -> None:
    expected = train_unsharded(len(ranks), torch.float32, OPTIMIZERS[options])
    for tensors in ranks:
        for name, tensor in tensors.items():
            # Sums in another order: a few float32 roundings a step, relative to the largest entry of a row.
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("options", OPTIMIZERS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_weights_and_accumulators_equal_the_oracle(world_size: int, options: str) -> None:
    assert_equal_the_oracle(run_threads(world_size, train_sharded, torch.float32, OPTIMIZERS[options]), options)


@pytest.mark.parametrize(
    ("world_size", "options", "through_memory"),
    [(2, "options", ""), (2, "options", "0"), (3, "plain", "0"), (4, "plain", "")],
)
def test_processes_do_what_threads_do_to_the_last_bit(
    world_size: int, options: str, through_memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, through_memory)
    expected = run_threads(world_size, train_sharded, torch.float32, OPTIMIZERS[options])
    found = run_ranks(world_size, train_sharded, torch.float32, OPTIMIZERS[options])
    for of_threads, of_processes in zip(expected, found, strict=True):
        assert all(torch.equal(of_threads[name], of_processes[name]) for name in of_threads)


def test_bfloat16_rows_stay_near_the_oracle() -> None:
    """A rounding that falls the other way changes a value by one bfloat16 step, so equality is of most values."""
    expected = train_unsharded(2, torch.bfloat16, OPTIMIZERS["plain"])
    (tensors, _) = run_threads(2, train_sharded, torch.bfloat16, OPTIMIZERS["plain"])
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=2e-2, atol=2e-2)
        assert (tensor == expected[name]).float().mean() > 0.5, name


def test_the_same_world_size_twice_is_bit_for_bit_the_same() -> None:
    first, second = (run_threads(3, train_sharded, torch.float32, OPTIMIZERS["options"]) for _ in range(2))
    for rank in range(3):
        for name in first[rank]:
            assert torch.equal(first[rank][name], second[rank][name]), name


def train_on_wire(ranks: Ranks, wire_dtype: torch.dtype | None) -> torch.Tensor:
    rank = ranks.rank
    tables = et.EmbeddingCollection(TABLES[:1], [FEATURES[0]], ranks=ranks, wire_dtype=wire_dtype)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    for step in range(2):
        loss_of(tables({"word": make_batch(step, rank)["word"]})).backward()
        optimizer.step()
        optimizer.zero_grad()
    return tables.gather_table("word")


def test_bfloat16_on_the_wire_is_near_float32_in_the_tables() -> None:
    exact = run_threads(2, train_on_wire, None)[0]
    narrow = run_threads(2, train_on_wire, torch.bfloat16)[0]
    assert narrow.dtype == torch.float32
    assert not torch.equal(narrow, exact)
    # A bfloat16 has 8 bits; Adagrad's steps are of the size of the rate, 0.1.
    torch.testing.assert_close(narrow, exact, rtol=2e-2, atol=5e-3)


def accumulate_micro_batches(ranks: Ranks, together: bool) -> torch.Tensor:
    rank = ranks.rank
    tables = et.EmbeddingCollection(TABLES[:1], [FEATURES[0]], ranks=ranks)
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.1)
    batches = [{"word": make_batch(step, rank)["word"]} for step in (0, 1)]
    if together:
        sum(loss_of(tables(batch)) for batch in batches).backward()
    else:
        for batch in batches:
            loss_of(tables(batch)).backward()
    optimizer.step()
    return tables.gather_table("word")


@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_accumulate_until_the_step(world_size: int) -> None:
    apart = run_threads(world_size, accumulate_micro_batches, False)[0]
    together = run_threads(world_size, accumulate_micro_batches, True)[0]
    torch.testing.assert_close(apart, together, rtol=1e-6, atol=1e-7)
