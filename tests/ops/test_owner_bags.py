"""Bags whose rows lie at several owners: one body for every implementation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops.owner_bags import SplitBags, add_sums, join_bags, native, share_out, split_bags
from embedtrain.ops.pool_rows import Bags
from tests.ops.conftest import run_on
from tests.ops.test_rows import make_features

NUM_LOCAL_ROWS = 11
FAR = 1 << 45


@pytest.fixture(params=["reference", "native", "native on 3 threads"])
def threaded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test once per implementation. There is none for Triton: GPUs run the reference on other kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 if request.param.endswith("3 threads") else 1)
    yield from run_on(request.param.partition(" ")[0], monkeypatch)
    torch.set_num_threads(before)


def make_split(
    num_owners: int, num_bags: int, dtype: torch.dtype = torch.int32
) -> tuple[list[Bags], Tensor, SplitBags]:
    bags = make_features(num_bags)
    num_values = sum(feature.num_values for feature in bags)
    generator = torch.Generator().manual_seed(num_owners)
    keys = torch.randint(0, num_owners * NUM_LOCAL_ROWS, (num_values,), generator=generator)
    split = split_bags(keys, bags, num_owners=num_owners, num_local_rows=NUM_LOCAL_ROWS, dtype=dtype)
    return bags, keys, split


def bags_of_values(bags: list[Bags]) -> list[int]:
    """Returns the bag of each value; bags are numbered through all features."""
    lengths = [torch.ones(b.num_bags, dtype=torch.int64) if b.lengths is None else b.lengths for b in bags]
    return torch.repeat_interleave(torch.cat(lengths)).tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("num_owners", "num_bags"), [(1, 9), (2, 0), (2, 4000), (3, 1), (7, 50)])
def test_bags_arrive_at_the_owners_of_their_rows(
    threaded: str, num_owners: int, num_bags: int, dtype: torch.dtype
) -> None:
    bags, keys, split = make_split(num_owners, num_bags, dtype)
    values = list(zip(bags_of_values(bags), keys.tolist(), range(len(keys)), strict=True))
    weights = torch.cat([torch.ones(b.num_values) if b.weights is None else b.weights for b in bags])
    parts = split.rows.split(split.id_counts.tolist()), split.bag_of_sum.split(split.sum_counts.tolist())
    assert split.rows.dtype == dtype and split.weights is not None
    by_owner = [[value for value in values if value[1] // NUM_LOCAL_ROWS == owner] for owner in range(num_owners)]
    assert torch.equal(split.weights, weights[[place for own in by_owner for _, _, place in own]])
    for own, rows, bag_of_sum in zip(by_owner, *parts, strict=True):
        joined, lengths = join_bags(rows, len(bag_of_sum))
        assert joined.tolist() == [key % NUM_LOCAL_ROWS for _, key, _ in own]
        assert bag_of_sum.tolist() == sorted({bag for bag, _, _ in own})
        assert torch.repeat_interleave(bag_of_sum, lengths).tolist() == [bag for bag, _, _ in own]


def test_bags_without_weights_have_none_after_the_split(threaded: str) -> None:
    split = split_bags(torch.tensor([3, 0]), [Bags(2)], num_owners=2, num_local_rows=2, dtype=torch.int64)
    assert split.weights is None and split.rows.tolist() == [~0, ~1] and split.bag_of_sum.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 37, 64, 129])
def test_sums_are_added_up_and_their_gradients_shared_out(threaded: str, dim: int, dtype: torch.dtype) -> None:
    bags, _, split = make_split(3, 700)
    generator = torch.Generator().manual_seed(dim)
    sizes = split.sum_counts.tolist()
    sums = [torch.randn(size, dim, generator=generator).to(dtype) for size in sizes]
    lengths = [torch.ones(b.num_bags) if b.lengths is None else b.lengths.clamp(min=1).float() for b in bags]
    factors = torch.cat(
        [1.0 / own if b.is_mean else torch.ones_like(own) for b, own in zip(bags, lengths, strict=True)]
    )
    expected = torch.zeros(len(factors), dim)
    expected.index_add_(0, split.bag_of_sum, torch.cat(sums).float())
    pooled = add_sums(sums, split.bag_of_sum, bags)
    torch.testing.assert_close(torch.cat(pooled), expected * factors[:, None], rtol=1e-6, atol=1e-6)
    grads = [None if number == 1 else torch.randn(len(each), dim) for number, each in enumerate(pooled)]
    rooms = [torch.full((size, dim), 7.0, dtype=dtype) for size in sizes]
    share_out(grads, bags, split.bag_of_sum, rooms)
    of_bags = torch.cat([torch.zeros_like(p) if g is None else g for p, g in zip(pooled, grads, strict=True)])
    assert torch.equal(torch.cat(rooms), (of_bags * factors[:, None])[split.bag_of_sum].to(dtype))


def test_a_batch_of_no_bags_splits_and_adds_up_to_nothing(threaded: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    split = split_bags(none, [], num_owners=2, num_local_rows=5, dtype=torch.int32)
    assert split.id_counts.tolist() == split.sum_counts.tolist() == [0, 0]
    rooms = [torch.zeros(0, 4), torch.zeros(0, 4)]
    share_out([], [], split.bag_of_sum, rooms)
    assert add_sums(rooms, split.bag_of_sum, []) == [] or add_sums(rooms, split.bag_of_sum, [])[0].numel() == 0
    assert [each.tolist() for each in join_bags(split.rows, 0)] == [[], []]


def test_rows_of_more_or_fewer_bags_are_refused(threaded: str) -> None:
    rows = torch.tensor([~1, 2, ~0], dtype=torch.int32)
    assert [each.tolist() for each in join_bags(rows, 2)] == [[1, 2, 0], [2, 1]]
    for num_bags in (0, 1, 3):
        with pytest.raises(ValueError, match="bags, got 2"):
            join_bags(rows, num_bags)
    with pytest.raises(ValueError, match="expected 2 sums, got 1"):
        add_sums([torch.zeros(1, 2)], torch.tensor([0, 1]), [Bags(2)])
    with pytest.raises(ValueError, match="room for 2 gradients, got 1"):
        share_out([None], [Bags(2)], torch.tensor([0, 1]), [torch.zeros(1, 2)])


needs_library = pytest.mark.skipif(library.find() is None, reason="the native library was not built")


@needs_library
@pytest.mark.parametrize("last", [10, -1, FAR, -FAR, (1 << 63) - 1])
def test_keys_of_no_owner_are_an_error(last: int) -> None:
    with pytest.raises(IndexError, match=r"must lie in \[0, 10\)"):
        native.split_bags(torch.tensor([0, 9, last]), [Bags(3)], 2, 5, torch.int32)


@needs_library
@pytest.mark.parametrize("bag_of_sum", [[0, 2], [1, 0], [-1, 1], [0, FAR], [0, 0]])
def test_sums_of_no_bag_are_an_error(bag_of_sum: list[int]) -> None:
    bags, sums = [Bags(2)], [torch.ones(2, 4)]
    with pytest.raises(IndexError, match=r"expected bags in \[0, 2\)"):
        native.add_sums(sums, torch.tensor(bag_of_sum), bags)
    if bag_of_sum not in ([1, 0], [0, 0]):  # to read in another order does no harm
        with pytest.raises(IndexError, match=r"expected bags in \[0, 2\)"):
            native.share_out([torch.ones(2, 4)], bags, torch.tensor(bag_of_sum), sums)


@needs_library
@pytest.mark.parametrize("lengths", [[2, 3], [-1, 7], [FAR, 6], [0, 0]], ids=str)
def test_lengths_that_were_overwritten_are_an_error(lengths: list[int]) -> None:
    kept = torch.tensor([2, 4])
    bags = [Bags(6, kept)]
    kept.copy_(torch.tensor(lengths))
    with pytest.raises(ValueError, match="add up to 6"):
        native.split_bags(torch.arange(6), bags, 2, 5, torch.int64)
