"""Gathering, pooling and summing of rows: one body for every implementation."""

from __future__ import annotations

import pytest
import torch

from embedtrain.ops._backend import library
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.pool_rows import Bags, pool_rows, pool_rows_backward
from embedtrain.ops.segment_sum import segment_sum
from embedtrain.ops.sort_unique import sort_unique

DIMS = [1, 3, 16, 37, 64, 100, 129, 300]


def sized(backend: str, size: int) -> int:
    """Returns the size, or less for Triton's interpreter, which takes about a millisecond a program."""
    return min(size, 40) if backend == "triton" else size


def make_source(num_rows: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(dim)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("num_wanted", [0, 1, 2000])
def test_gathered_rows_are_copies(threaded_backend: str, num_wanted: int, dim: int, dtype: torch.dtype) -> None:
    source = make_source(50, dim, dtype)
    rows = torch.randint(0, 50, (sized(threaded_backend, num_wanted),), generator=torch.Generator().manual_seed(1))
    assert torch.equal(gather_rows(source, rows), source[rows])
    for wanted in (torch.float32, torch.bfloat16):
        assert torch.equal(gather_rows(source, rows, wanted), source[rows].to(wanted))


def test_tables_of_no_rows_give_none(backend: str) -> None:
    source, none = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert gather_rows(source, none).shape == (0, 3)
    (pooled,) = pool_rows(source, none, [Bags(0, torch.tensor([0, 0]))])
    assert torch.equal(pooled, torch.zeros(2, 3))
    keys = sort_unique(none)
    assert pool_rows_backward([pooled], [Bags(0, torch.tensor([0, 0]))], keys, 3).shape == (0, 3)
    assert segment_sum(source, keys).shape == (0, 3)


def test_rows_of_other_types_are_refused(backend: str) -> None:
    rows = torch.zeros(2, dtype=torch.int64)
    for source, wanted in ((torch.zeros(3, 2).double(), None), (torch.zeros(3, 2), torch.float16)):
        with pytest.raises(ValueError):
            gather_rows(source, rows, wanted)
    with pytest.raises(ValueError):
        gather_rows(torch.zeros(3, 2), rows.int())
    with pytest.raises(ValueError):
        pool_rows(torch.zeros(3, 2), rows, [Bags(1)])
    with pytest.raises(ValueError):
        pool_rows_backward([torch.zeros(1, 2)], [Bags(2)], sort_unique(rows), 2)
    with pytest.raises(ValueError):
        segment_sum(torch.zeros(3, 2), sort_unique(rows))


def test_pooled_vectors_are_written_where_they_are_wanted(backend: str) -> None:
    source, rows = make_source(9, 37, torch.float32), torch.tensor([0, 8, 3, 3, 1])
    bags = [Bags(3, torch.tensor([2, 0, 1])), Bags(2)]
    expected = pool_rows(source, rows, bags)
    for dtype in (torch.float32, torch.bfloat16):
        room = torch.full((7, 37), 9.0, dtype=dtype)
        out = [room[1:4], room[4:6]]
        assert all(a is b for a, b in zip(pool_rows(source, rows, bags, out=out), out, strict=True))
        assert torch.equal(room[1:6], torch.cat(expected).to(dtype)) and room[[0, 6]].eq(9.0).all()
    for wrong in (torch.zeros(2, 37), torch.zeros(37, 3).T, torch.zeros(3, 37).double()):
        with pytest.raises(ValueError, match="expected out"):
            pool_rows(source, rows, bags, out=[wrong, room[4:6]])


def make_features(num_bags: int) -> list[Bags]:
    """One value a bag, sums and means, weighted and not; some bags are empty, in some every id is the same."""
    generator = torch.Generator().manual_seed(7)
    features = []
    for number in range(6):
        lengths = torch.randint(0, 5, (num_bags,), generator=generator)
        num_values = num_bags if number < 2 else int(lengths.sum())
        weights = torch.rand(num_values, generator=generator) if number % 2 else None
        features.append(Bags(num_values, None if number < 2 else lengths, weights, is_mean=number >= 4))
    return features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("num_rows", "num_bags"), [(1, 40), (9, 0), (9, 1), (30, 500)])
def test_pooling_and_its_gradient_equal_a_product_with_a_matrix(
    threaded_backend: str, num_rows: int, num_bags: int, dim: int, dtype: torch.dtype
) -> None:
    num_bags = sized(threaded_backend, num_bags)
    features = make_features(num_bags)
    source = make_source(num_rows, dim, dtype)
    sizes = [feature.num_values for feature in features]
    index = torch.randint(0, num_rows, (sum(sizes),), generator=torch.Generator().manual_seed(3))
    pooled = pool_rows(source, index, features)
    grads = [make_source(feature.num_bags, dim, torch.float32) for feature in features]
    expected_grad = torch.zeros(num_rows, dim, dtype=torch.float64)
    for feature, part, vectors, grad in zip(features, index.split(sizes), pooled, grads, strict=True):
        lengths = torch.ones(num_bags, dtype=torch.int64) if feature.lengths is None else feature.lengths
        matrix = torch.zeros(num_bags, num_rows, dtype=torch.float64)
        factors = torch.ones(feature.num_values) if feature.weights is None else feature.weights
        if feature.is_mean:
            factors = factors / torch.repeat_interleave(lengths, lengths)
        bag = torch.repeat_interleave(torch.arange(num_bags), lengths)
        matrix.index_put_((bag, part), factors.double(), accumulate=True)
        assert vectors.dtype == torch.float32
        # The rounding of float32 sums of up to 4 rows forward, and of a few thousand backward.
        torch.testing.assert_close(vectors.double(), matrix @ source.double(), rtol=1e-5, atol=1e-5)
        expected_grad += matrix.T @ grad.double()
    keys = sort_unique(index)
    summed = pool_rows_backward(grads, features, keys, dim)
    torch.testing.assert_close(summed.double(), expected_grad[keys.unique], rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not library.PATH.exists(), reason="only the native kernel writes to a buffer")
def test_sums_are_written_to_the_buffer() -> None:
    keys, grads, features = sort_unique(torch.tensor([4, 2, 4])), [torch.arange(6.0).view(3, 2)], [Bags(3)]
    buffer = torch.full((2, 2), float("nan"))
    summed = pool_rows_backward(grads, features, keys, 2, buffer=buffer)
    assert summed.data_ptr() == buffer.data_ptr() and summed.tolist() == [[2, 3], [4, 6]]
    with pytest.raises(ValueError, match=r"expected a contiguous buffer \[2, 2\] float32"):
        pool_rows_backward(grads, features, keys, 2, buffer=torch.zeros(3, 2))


def test_features_without_a_gradient_add_nothing(backend: str) -> None:
    features = [Bags(2, torch.tensor([2])), Bags(3)]
    keys = sort_unique(torch.tensor([4, 1, 1, 4, 6]))
    grads = [None, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])]
    assert pool_rows_backward(grads, features, keys, 2).tolist() == [[1, 2], [3, 4], [5, 6]]
    expanded = [torch.ones(()).expand(1, 2), None]
    assert pool_rows_backward(expanded, features, keys, 2).tolist() == [[1, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize(("num_values", "num_keys"), [(0, 1), (1, 1), (900, 1), (900, 30), (900, 5000)])
def test_segment_sums_equal_index_add(threaded_backend: str, num_values: int, num_keys: int, dim: int) -> None:
    num_values = min(num_values, 200) if threaded_backend == "triton" else num_values
    keys = sort_unique(torch.randint(0, num_keys, (num_values,), generator=torch.Generator().manual_seed(5)))
    values = make_source(num_values, dim, torch.float32)
    assert keys.inverse is not None
    expected = torch.zeros(keys.unique.numel(), dim, dtype=torch.float64).index_add_(0, keys.inverse, values.double())
    torch.testing.assert_close(segment_sum(values, keys).double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(segment_sum(values, keys, 0.5).double(), 0.5 * expected, rtol=1e-5, atol=1e-4)
