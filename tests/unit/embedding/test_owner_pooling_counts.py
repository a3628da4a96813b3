"""Counting distinct rows and sums by a sample: what decides where bags are pooled."""

from __future__ import annotations

import pytest
import torch

from embedtrain.embedding.pooling_choice import count_rows, count_sums
from embedtrain.sharding.layout import SpreadLayout


@pytest.mark.parametrize("num_rows", [10_007, 1_000_003, 1 << 30])
@pytest.mark.parametrize("power", [1, 4])
def test_a_sample_stands_for_the_distinct_rows(num_rows: int, power: int) -> None:
    """Rows lie where the layout spreads them: a regular pattern, which the hash must not resonate with."""
    draws = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** power
    keys = SpreadLayout(num_rows).slot_of((draws * num_rows).long())
    sizes = [150_000, 0, 50_000]
    counts = count_rows(keys, sizes, num_rows)
    for count, part in zip(counts.tolist(), keys.split(sizes), strict=True):
        num_distinct = part.unique().numel()
        assert count % 32 == 0
        # Each distinct key is taken with probability 1/32: four standard deviations, or two rows where they are few.
        assert count == pytest.approx(num_distinct, abs=4 * (32 * num_distinct) ** 0.5 + 64)


@pytest.mark.parametrize("num_owners", [2, 5])
def test_a_sample_of_the_bags_stands_for_their_sums(num_owners: int) -> None:
    generator = torch.Generator().manual_seed(2)
    lengths = [torch.randint(0, 6, (60_000,), generator=generator), torch.full((100_000,), 3), torch.zeros(0).long()]
    bag = torch.repeat_interleave(torch.cat(lengths))
    owner = torch.randint(num_owners, (bag.numel(),), generator=generator)
    keys = owner * 1000 + torch.randint(1000, (bag.numel(),), generator=generator)
    counts = count_sums(keys, lengths, num_local_rows=1000)
    pairs = torch.stack([owner, bag]).unique(dim=1)[1]
    expected = [int((pairs < 60_000).sum()), int((pairs >= 60_000).sum()), 0]
    # Each bag is taken with probability 1/64, some 900 and 1,600 of them: four standard deviations.
    assert counts.tolist() == pytest.approx(expected, rel=0.15)


def test_small_batches_are_counted_exactly() -> None:
    keys = torch.arange(8000) % 123
    assert count_rows(keys, [100, 7900], 123).tolist() == [100, 123]
    lengths = [torch.tensor([3, 0, 97]), torch.full((79,), 100)]
    owners = [{key // 100 for key in bag.tolist()} for bag in keys.split(torch.cat(lengths).tolist())]
    expected = [sum(map(len, owners[:3])), sum(map(len, owners[3:]))]
    assert count_sums(keys, lengths, num_local_rows=100).tolist() == expected
