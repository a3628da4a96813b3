"""Counting distinct keys by a sample: what decides where bags are pooled."""

from __future__ import annotations

import pytest
import torch

from embedtrain.embedding.owner_pooling import _distinct_sample
from embedtrain.sharding.layout import SpreadLayout


@pytest.mark.parametrize("num_rows", [10_007, 1_000_003, 1 << 30])
@pytest.mark.parametrize("power", [1, 4])
def test_a_sample_stands_for_the_distinct_keys(num_rows: int, power: int) -> None:
    """Rows lie where the layout spreads them: a regular pattern, which the hash must not resonate with."""
    draws = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** power
    keys = SpreadLayout(num_rows).slot_of((draws * num_rows).long())
    sample, weight = _distinct_sample(keys, num_rows)
    assert weight == 32
    num_distinct = keys.unique().numel()
    # Each distinct key is taken with probability 1/32: four standard deviations, or two rows where they are few.
    assert sample.numel() * weight == pytest.approx(num_distinct, abs=4 * (32 * num_distinct) ** 0.5 + 64)


def test_small_batches_are_counted_exactly() -> None:
    keys = torch.arange(8000) % 123
    sample, weight = _distinct_sample(keys, 123)
    assert (sample.numel(), weight) == (123, 1)
