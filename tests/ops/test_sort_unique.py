"""Sorting of keys: one body for every implementation."""

from __future__ import annotations

import pytest
import torch

from embedtrain.ops.sort_unique import OrderedKeys, order_keys, sort_unique


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("num_keys", [0, 1, 2, 700, 40_000])
@pytest.mark.parametrize("bound", [1, 40, 1 << 21, 1 << 45])
def test_equals_torch_unique(backend: str, num_keys: int, bound: int, num_threads: int) -> None:
    keys = torch.randint(0, bound, (num_keys,), generator=torch.Generator().manual_seed(num_keys))
    expected, inverse = torch.unique(keys, return_inverse=True)
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        results = [sort_unique(keys), sort_unique(keys, bound=bound, with_inverse=False)]
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert torch.equal(result.unique, expected)
        assert torch.equal(result.order, torch.sort(keys, stable=True).indices)
        assert result.starts.tolist() == [0, *torch.bincount(inverse, minlength=expected.numel()).cumsum(0).tolist()]
    assert results[0].inverse is not None and torch.equal(results[0].inverse, inverse)
    assert results[1].inverse is None


@pytest.mark.parametrize("num_keys", [0, 1, 700])
def test_keys_in_order_are_counted_before_it_is_known_how_many_are_distinct(backend: str, num_keys: int) -> None:
    keys = torch.randint(0, 40, (num_keys,), generator=torch.Generator().manual_seed(num_keys))
    expected, inverse = torch.unique(keys, return_inverse=True)
    ordered = order_keys(keys, bound=40)
    assert isinstance(ordered, OrderedKeys) == (backend != "native")
    assert ordered.inverse is not None and torch.equal(ordered.inverse, inverse)
    bounds = torch.tensor([0, 1, 20, 40])
    assert ordered.num_below(bounds).tolist() == [int((expected < bound).sum()) for bound in bounds]
    assert torch.equal(ordered.sorted.unique, expected)


def test_keys_of_another_type_are_refused(backend: str) -> None:
    with pytest.raises(ValueError, match="int32"):
        sort_unique(torch.zeros(3, dtype=torch.int32))
