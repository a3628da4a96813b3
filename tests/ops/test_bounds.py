"""Native kernels find out that indices, lengths and sizes lie outside, and raise: they neither read nor write there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from embedtrain.ops._backend import library
from embedtrain.ops.gather_rows import native as gather
from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.pool_rows import native as pool
from embedtrain.ops.row_gradient import Delivery, RowGradient, Run
from embedtrain.ops.row_update import Moments, RowStep
from embedtrain.ops.row_update import native as update
from embedtrain.ops.sort_unique import SortedKeys
from embedtrain.ops.sort_unique import native as sort
from embedtrain.ops.spread_keys import SpreadTable, spread_keys

pytestmark = pytest.mark.skipif(library.find() is None, reason="the native library was not built")

FAR = 1 << 45
"""A row whose address no process has."""
NUM_ROWS, DIM, NUM_VALUES = 10, 64, 6


def indices(last: int) -> Tensor:
    return torch.tensor([0, 1, 2, 3, 9, last])


def source() -> Tensor:
    return torch.ones(NUM_ROWS, DIM)


def apply(bags: list[Bags], rows: Tensor, runs: tuple[Run, ...] = ()) -> None:
    grads = [torch.ones(feature.num_bags, DIM) for feature in bags]
    gradient = RowGradient([Delivery(rows, bags, grads, runs=runs)], num_rows=NUM_ROWS, dim=DIM)
    weight, state = source(), torch.zeros(NUM_ROWS)
    try:
        update.moment_update(weight, None, state, gradient, RowStep(lr=0.1), Moments())
    except (IndexError, ValueError):
        assert weight.eq(1.0).all() and state.eq(0.0).all()
        raise


@pytest.mark.parametrize("last", [NUM_ROWS, -1, FAR, -FAR, (1 << 63) - 1])
@pytest.mark.parametrize(
    "call",
    [
        lambda index: gather.gather_rows(source(), index, torch.float32, None),
        lambda index: gather.gather_rows(source(), index, torch.bfloat16, None),
        lambda index: gather.gather_rows(torch.ones(0, DIM), index, torch.float32, None),
        lambda index: pool.pool_rows(source(), index, [Bags(NUM_VALUES, torch.tensor([2, 4]))]),
        lambda index: pool.pool_rows(source()[:, :5], index, [Bags(NUM_VALUES)]),
        lambda index: pool.pool_rows(source().bfloat16(), index, [Bags(2), Bags(4, torch.tensor([4]))]),
        lambda index: apply([Bags(NUM_VALUES, torch.tensor([2, 4]))], index),
        lambda index: sort.sort_unique(index, NUM_ROWS - 1, True),
    ],
)
def test_indices_outside_are_an_error(call: Callable[[Tensor], object], last: int) -> None:
    with pytest.raises(IndexError, match=r"must lie in \[0, "):
        call(indices(last))


@pytest.mark.parametrize("last", [-1, 1 << 40, -FAR, (1 << 63) - 1])
def test_keys_outside_a_large_bound_are_an_error(last: int) -> None:
    with pytest.raises(IndexError, match=r"must lie in \[0, "):
        sort.sort_unique(indices(last), (1 << 40) - 1, True)


@pytest.mark.parametrize(
    "lengths", [[2, 3], [2, 5], [-1, 7], [FAR, 6], [7, -1], [(1 << 63) - 1, 7], [0, 0]], ids=lambda value: str(value)
)
def test_lengths_that_were_overwritten_are_an_error(lengths: list[int]) -> None:
    index, kept = indices(5), torch.tensor([2, 4])
    bags = [Bags(NUM_VALUES, kept)]
    keys = sort.sort_unique(index, NUM_ROWS - 1, False)
    kept.copy_(torch.tensor(lengths))
    for call in (
        lambda: pool.pool_rows(source(), index, bags),
        lambda: pool.pool_rows_backward([torch.ones(2, DIM)], bags, keys, DIM),
        lambda: apply(bags, index),
    ):
        with pytest.raises(ValueError, match="add up to 6"):
            call()


@pytest.mark.parametrize(
    "keys",
    [
        SortedKeys(torch.arange(6), torch.arange(7), torch.tensor([0, 1, 2, 3, 4, FAR]), None),
        SortedKeys(torch.arange(6), torch.arange(7), torch.tensor([0, 1, 2, 3, 4, -1]), None),
        SortedKeys(torch.arange(6), torch.tensor([0, 1, 2, 3, 4, 5, FAR]), torch.arange(6), None),
        SortedKeys(torch.arange(6), torch.tensor([0, -FAR, 2, 3, 4, 5, 6]), torch.arange(6), None),
        SortedKeys(torch.arange(5), torch.arange(6), torch.arange(5), None),
    ],
)
def test_keys_of_other_values_are_an_error(keys: SortedKeys) -> None:
    with pytest.raises(IndexError, match="the sorted keys of 6 values"):
        pool.pool_rows_backward([torch.ones(NUM_VALUES, DIM)], [Bags(NUM_VALUES)], keys, DIM)


@pytest.mark.parametrize("last", [2, -1, FAR, -FAR])
def test_an_inverse_of_other_keys_is_an_error(last: int) -> None:
    starts = torch.tensor([0, 1, 3])
    for inverse in ([1, 0, last], [1, 1, 1], [0, 0, 0], [0, 0, 1]):
        with pytest.raises(IndexError, match="inverse of 3 keys does not belong to these 2 keys"):
            sort.order_of(torch.tensor(inverse), starts)
    for wrong in ([0, last, 3], [1, 1, 3], [0, 1, last]):
        with pytest.raises(IndexError, match="inverse of 3 keys does not belong to these 2 keys"):
            sort.order_of(torch.tensor([0, 1, 1]), torch.tensor(wrong))


def test_sizes_that_disagree_are_an_error() -> None:
    with pytest.raises(ValueError, match="runs of 6 values"):
        apply([Bags(NUM_VALUES)], indices(5), (Run(FAR, 0, NUM_ROWS),))
    with pytest.raises(IndexError):
        pool.pool_rows(source(), indices(5), [Bags(NUM_VALUES + 1)])
    with pytest.raises(ValueError, match=r"weights \[6\] float32"):
        Bags(NUM_VALUES, None, torch.ones(2))
    with pytest.raises(ValueError, match="lengths"):
        Bags(NUM_VALUES, torch.tensor([2, 4], dtype=torch.int32))
    with pytest.raises(ValueError, match="int64 or int32"):
        spread_keys([torch.zeros(3, dtype=torch.int16)], [SpreadTable(4, 1, 4, 0, 1)], 4)
