"""The exchange through shared memory: the same rows as the process group's, and no waiting for the dead."""

from __future__ import annotations

import os
import resource
import signal
import time

import pytest
import torch
import torch.distributed as dist

import embedtrain as et
from embedtrain.distributed import shared_memory
from embedtrain.distributed.ranks import GroupRanks, Ranks
from embedtrain.distributed.runtime import job_ranks
from embedtrain.distributed.shared_memory import VARIABLE, SharedMemoryRanks
from embedtrain.ops._backend.dispatch import cpu_backend
from embedtrain.testing.ranks import run_ranks
from tests.distributed import test_damping

# Rows from rank s to rank r in round n: none, fewer and more bytes than a copy prefetches, and many.
SIZES = [0, 3, 29, 700, 40_000]
DTYPES = [torch.float32, torch.bfloat16, torch.int64]

pytestmark = pytest.mark.skipif(cpu_backend() != "native", reason="the native library was not built")


def rows_between(sender: int, receiver: int, number: int) -> torch.Tensor:
    count = SIZES[(sender + 2 * receiver + number) % len(SIZES)]
    dtype = DTYPES[number % len(DTYPES)]
    generator = torch.Generator().manual_seed(100 * sender + 10 * receiver + number)
    return torch.randint(-99, 99, (count, 37), generator=generator).to(dtype)


def exchange_rounds(ranks: Ranks) -> None:
    rank, size = ranks.rank, ranks.size
    assert isinstance(ranks, SharedMemoryRanks)
    ways = (ranks, GroupRanks(ranks.group))
    for number in range(8):
        outgoing = [rows_between(rank, receiver, number) for receiver in range(size)]
        expected = [rows_between(sender, rank, number) for sender in range(size)]
        counts = [[len(rows) for rows in side] for side in (outgoing, expected)]
        for way in ways:
            received = way.all_to_all(torch.cat(outgoing), counts[0], counts[1])
            assert torch.equal(received, torch.cat(expected))
        for way in ways:
            assert float(way.all_reduce(torch.tensor(0.5 + rank, dtype=torch.float64))) == size**2 / 2


def count_page_faults(ranks: Ranks) -> dict[str, int]:
    """Returns by way how many fresh pages an exchange of 20 MiB to each of two ranks takes, after two of them."""
    assert isinstance(ranks, SharedMemoryRanks)
    count = (20 << 20) // (4 * 64)
    rows = torch.ones(2 * count, 64)
    found = {}
    for name, way in (("memory", ranks), ("group", GroupRanks(ranks.group))):
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            way.all_to_all(rows, [count] * 2, [count] * 2)
            found[name] = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return found


def test_a_large_exchange_takes_no_fresh_memory() -> None:
    # 40 MiB are 10,240 pages of 4 KiB. Gloo takes a few of its own.
    for found in run_ranks(2, count_page_faults):
        assert found["memory"] < 100 and found["group"] < 2000, found


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_arrive_as_through_the_process_group(world_size: int) -> None:
    run_ranks(world_size, exchange_rounds)


def train(
    ranks: Ranks, variable: str, wire_dtype: torch.dtype | None, is_lending: bool = False
) -> tuple[bool, list[torch.Tensor]]:
    os.environ[VARIABLE] = variable
    if is_lending:
        shared_memory._SMALLEST_LENT_BYTES = 0
    ranks = job_ranks()
    features = [et.FeatureSpec("item"), et.FeatureSpec("history", "item", pooling="mean")]
    features += [et.FeatureSpec("bought", "item", pooling="sum", pool_at="owner")]
    # Tables of four lengths, whose gradients are sent one after the other.
    others = [et.TableSpec(f"other{dim}", 40, dim) for dim in (4, 5, 6)]
    features += [et.FeatureSpec(spec.name) for spec in others]
    tables = et.EmbeddingCollection(
        [et.TableSpec("item", 90, 12), *others], features, ranks=ranks, seed=3, wire_dtype=wire_dtype
    )
    optimizer = et.optim.RowwiseAdagrad(tables, lr=0.3, max_grad_norm=0.5)
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * step + ranks.rank)
        for _ in range(1 + step % 2):  # some steps are of several batches
            bags = [torch.randint(0, 90, (n,), generator=generator).tolist() for n in (5, 0, 9)]
            out = tables(dict.fromkeys(("item", "history", "bought"), et.Jagged.from_lists(bags)))
            loss = out["item"].square().sum() + out["history"].sin().sum() + out["bought"].cos().sum()
            more = tables({spec.name: torch.randint(0, 40, (30,), generator=generator) for spec in others})
            (loss + sum(vectors.exp().sum() for vectors in more.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = [tables.gather_table(name, state) for name in tables.shards for state in ("weight", "accumulator")]
    is_shared = isinstance(ranks, SharedMemoryRanks)
    if is_shared:
        assert has_lent(ranks) == (is_lending and wire_dtype is None)
    return is_shared, found


def has_lent(ranks: Ranks) -> bool:
    """Returns whether a rank lent gradients, or would have if there were huge pages."""
    assert isinstance(ranks, SharedMemoryRanks)
    return any(area.lent_in >= 0 or area.why_not is not None for area in ranks._gradients.areas)


@pytest.mark.parametrize(
    ("world_size", "wire_dtype", "is_lending"),
    [(2, None, False), (2, None, True), (2, torch.bfloat16, True), (3, torch.bfloat16, False), (3, None, True)],
)
def test_training_is_the_same_to_the_last_bit(
    world_size: int, wire_dtype: torch.dtype | None, is_lending: bool
) -> None:
    through_memory = run_ranks(world_size, train, "", wire_dtype, is_lending)
    through_the_group = run_ranks(world_size, train, "0", wire_dtype)
    for (is_shared, found), (is_also_shared, expected) in zip(through_memory, through_the_group, strict=True):
        assert is_shared and not is_also_shared
        for tensor, other in zip(found, expected, strict=True):
            assert torch.equal(tensor, other)


def connect_where_one_does_not_want(ranks: Ranks) -> bool:
    os.environ[VARIABLE] = "01"[ranks.rank]
    return not isinstance(job_ranks(), SharedMemoryRanks)


def test_one_unwilling_rank_leaves_all_with_the_process_group() -> None:
    assert all(run_ranks(2, connect_where_one_does_not_want))


def disagree(ranks: Ranks) -> None:
    rows = torch.ones(400_000 * 2, 4)
    # Rank 1 expects one row of rank 0, which sends many.
    counts = [400_000, 400_000], [400_000, 400_000] if ranks.rank == 0 else [1, 400_000]
    with pytest.raises(ValueError, match=r"a rank sent rows \[400000, 4\] to a rank that expects \[1, 4\]"):
        ranks.all_to_all(rows, *counts)
        assert ranks.rank == 0
        raise ValueError("a rank sent rows [400000, 4] to a rank that expects [1, 4]")


def test_ranks_that_disagree_on_the_number_of_rows_are_told() -> None:
    run_ranks(2, disagree)


def accumulate(ranks: Ranks, variable: str, is_lending: bool = False) -> list[torch.Tensor]:
    """Trains two groups of tables on several batches a step; rank 1 is late."""
    os.environ[VARIABLE] = variable
    if is_lending:
        shared_memory._SMALLEST_LENT_BYTES = 0
    tables = et.EmbeddingCollection([et.TableSpec("a", 50, 4), et.TableSpec("b", 50, 6)], ranks=job_ranks(), seed=1)
    optimizer = et.optim.SGD(tables, lr=0.1)
    for step in range(3):
        for batch in range(3):
            generator = torch.Generator().manual_seed(100 * step + 10 * batch + ranks.rank)
            found = tables({name: torch.randint(0, 50, (40,), generator=generator) for name in "ab"})
            time.sleep(0.03 * ranks.rank)
            sum(vectors.sin().sum() for vectors in found.values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [tables.gather_table(name) for name in "ab"]


@pytest.mark.parametrize("is_lending", [False, True])
def test_gradients_wait_unchanged_for_a_late_rank(is_lending: bool) -> None:
    through_memory, through_the_group = run_ranks(2, accumulate, "", is_lending), run_ranks(2, accumulate, "0")
    for found, expected in zip(through_memory, through_the_group, strict=True):
        for tensor, other in zip(found, expected, strict=True):
            assert torch.equal(tensor, other)


def train_words(ranks: Ranks, variable: str) -> dict[str, torch.Tensor]:
    os.environ[VARIABLE] = variable
    shared_memory._SMALLEST_LENT_BYTES = 0
    ranks = job_ranks()
    found = {**test_damping.train(ranks, "cbow", num_parts=1)}
    if variable == "":
        assert not has_lent(ranks), "CBOW has no kernel that writes to lent memory"
    found |= {f"skipgram {name}": rows for name, rows in test_damping.train(ranks, "skipgram", num_parts=3).items()}
    if variable == "":
        assert has_lent(ranks)
    return found


def test_lent_gradients_of_words_are_the_same_to_the_last_bit() -> None:
    for found, expected in zip(run_ranks(2, train_words, ""), run_ranks(2, train_words, "0"), strict=True):
        assert found and all(torch.equal(found[name], values) for name, values in expected.items())


def lend(ranks: Ranks) -> str:
    """Sends lent rows in turn with copied ones, with and without numbers; rank 1 reads late."""
    assert isinstance(ranks, SharedMemoryRanks)
    shared_memory._SMALLEST_LENT_BYTES = 0
    cpu, other = torch.device("cpu"), 1 - ranks.rank
    for number in range(12):
        to_each = [rows_between(ranks.rank, receiver, 3 * number).float() for receiver in range(2)]
        from_each = [rows_between(sender, ranks.rank, 3 * number).float() for sender in range(2)]
        rows = torch.cat(to_each)
        buffer = ranks.lending_buffer(*rows.shape, cpu) if number % 4 < 3 else None
        if buffer is None and number % 4 < 3 and len(rows):
            return "the system has no huge pages for shared memory"
        sent = rows if buffer is None else buffer.copy_(rows)
        numbers = rows[:, 0].clone() if number % 2 else None
        counts = [len(part) for part in to_each], [len(part) for part in from_each]
        parts, of_parts = ranks.all_to_all_split(sent, *counts, torch.float32, numbers)
        time.sleep(0.02 * ranks.rank)
        assert torch.equal(torch.cat(parts), torch.cat(from_each))
        assert (of_parts is None) == (numbers is None)
        if of_parts is not None:
            assert torch.equal(of_parts, torch.cat(from_each)[:, 0])
        assert len(parts[other]) == 0 or ranks._gradients.was_received(parts[other])
        del buffer, sent, parts
    held = [ranks.lending_buffer(1000, 7, cpu) for _ in range(8)]
    assert 2 < sum(buffer is not None for buffer in held) < 8, "what is in use must not be lent again"
    assert len({buffer.data_ptr() for buffer in held if buffer is not None}) == sum(b is not None for b in held)
    held.clear()
    lent = ranks.lending_buffer(2, 3, cpu)
    assert lent is not None
    with pytest.raises(ValueError, match="a rank sent 12 bytes of rows to a rank that expects 24"):
        # Each rank expects a row more than the other one sends.
        ranks.all_to_all_split(lent, [1, 1], [2, 2], torch.float32)
    return ""


def test_lent_rows_are_read_where_they_are_and_stay_until_they_were_read() -> None:
    for reason in run_ranks(2, lend):
        if reason:
            pytest.skip(reason)


def wait_for_the_dead(ranks: Ranks) -> None:
    assert isinstance(ranks, SharedMemoryRanks)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(dist.DistError, match="rank 1 is gone: rank 0 waited"):
        ranks.all_to_all(torch.ones(4, 2), [2, 2], [2, 2])
    assert time.monotonic() - started < 10
    raise ValueError("rank 0 saw it")


@pytest.mark.serial
def test_a_dead_peer_is_noticed_at_once() -> None:
    with pytest.raises(Exception, match=r"rank 0 saw it|rank 1"):
        run_ranks(2, wait_for_the_dead)


def wait_for_the_late(ranks: Ranks) -> str:
    assert isinstance(ranks, SharedMemoryRanks)
    ranks._inbox._timeout_seconds = 0.3
    if ranks.rank == 1:
        time.sleep(1.5)
        return ""
    with pytest.raises(dist.DistError) as caught:
        ranks.all_to_all(torch.ones(4, 2), [2, 2], [2, 2])
    return str(caught.value)


@pytest.mark.serial
def test_a_late_peer_is_waited_for_as_long_as_the_group_says() -> None:
    message, _ = run_ranks(2, wait_for_the_late)
    assert "rank 0 waited 0 s for rank 1's part" in message
