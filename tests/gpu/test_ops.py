"""The compiled kernels against the reference on the CPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops._backend.mix import mix64
from embedtrain.ops.busiest_rows import busiest_rows, count_buckets
from embedtrain.ops.damp_rows import Damping, damp_rows
from embedtrain.ops.gather_rows import gather_rows
from embedtrain.ops.gather_rows import reference as reference_gather
from embedtrain.ops.pool_rows import Bags, pool_rows, pool_rows_backward
from embedtrain.ops.pool_rows import reference as reference_pool
from embedtrain.ops.row_update import Moments, RowStep
from embedtrain.ops.row_update import reference as reference_update
from embedtrain.ops.sample_text import reference as reference_sample
from embedtrain.ops.sample_text import sample_text
from embedtrain.ops.segment_sum import reference as reference_sum
from embedtrain.ops.segment_sum import segment_sum
from embedtrain.ops.skipgram_block import TextBlock, reach_of, skipgram_block
from embedtrain.ops.skipgram_block import reference as reference_skipgram
from embedtrain.ops.sort_unique import sort_unique
from embedtrain.ops.top_eigenpairs import top_eigenpairs
from embedtrain.ops.weighted_square import weighted_square
from tests.ops.test_damp_rows import damp_exactly, make_damping
from tests.ops.test_sample_text import make as make_text
from tests.ops.test_skipgram_block import SHAPES, make
from tests.ops.updates import moment_update

pytestmark = pytest.mark.gpu

DIMS = [1, 3, 64, 100, 129, 300]


def on(device: torch.device, bags: Bags) -> Bags:
    moved = (None if tensor is None else tensor.to(device) for tensor in (bags.lengths, bags.weights))
    return Bags(bags.num_values, *moved, is_mean=bags.is_mean)


def test_triton_runs_the_ops(device: torch.device) -> None:
    assert dispatch.backend_of(torch.zeros(1, device=device)) == "triton"


@pytest.mark.parametrize("dim", [3, 100, 129])
def test_damping(device: torch.device, dim: int) -> None:
    damping = make_damping(1000, dim, 3)
    grad = torch.randn(1000, dim, generator=torch.Generator().manual_seed(dim))
    found = damp_rows(grad.to(device), Damping(*(tensor.to(device) for tensor in damping)))
    torch.testing.assert_close(found.cpu().double(), damp_exactly(grad, damping), rtol=1e-4, atol=1e-5)


def test_the_busiest_rows_have_their_counts_and_others_have_zero(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    counts, tables = torch.randint(1, 900, (700,), generator=generator).float(), torch.arange(700) % 2
    histogram = count_buckets(counts, tables, 2)
    moved = [tensor.to(device) for tensor in (torch.arange(700), counts, tables)]
    assert torch.equal(count_buckets(*moved[1:], 2).cpu(), histogram)
    found = busiest_rows(*moved, histogram.to(device), 40)
    for (rows, of_rows), (chosen, of_chosen) in zip(
        found, busiest_rows(torch.arange(700), counts, tables, histogram, 40), strict=True
    ):
        assert torch.equal(rows.cpu(), torch.arange(700))
        assert torch.equal(of_rows.cpu(), torch.zeros(700).index_copy(0, chosen, of_chosen))


@pytest.mark.parametrize("dim", [3, 100, 129])
def test_second_moments_and_their_eigenpairs(device: torch.device, dim: int) -> None:
    """Threads of the eigenpairs' kernel read what others wrote, which the interpreter cannot test."""
    source = torch.randn(500, dim, generator=torch.Generator().manual_seed(dim)) * torch.logspace(0, -2, dim)
    rows, weights = torch.arange(500), torch.rand(500)
    square = weighted_square(source.to(device), rows.to(device), weights.to(device))
    expected = weighted_square(source, rows, weights)
    torch.testing.assert_close(square.cpu(), expected, rtol=1e-4, atol=1e-3)
    values, vectors = top_eigenpairs(expected.to(device)[None].expand(2, -1, -1), 3)
    assert torch.equal(values[0], values[1]) and torch.equal(vectors[0], vectors[1])
    exact, _ = top_eigenpairs(expected[None], 3)
    torch.testing.assert_close(values[0].cpu(), exact[0], rtol=1e-2, atol=1e-3)
    products = vectors[0].cpu() @ vectors[0].cpu().T
    torch.testing.assert_close(products, torch.eye(3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("num_values", [0, 1, 5000])
def test_rows(device: torch.device, num_values: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(dim)
    source = torch.randn(300, dim, generator=generator).to(dtype)
    index = torch.randint(0, 300, (num_values,), generator=generator).square().remainder(300)
    for wanted in (torch.float32, torch.bfloat16):
        found = gather_rows(source.to(device), index.to(device), wanted)
        assert torch.equal(found.cpu(), reference_gather.gather_rows(source, index, wanted))
    lengths = torch.full((num_values // 5 + 1,), 5)
    lengths[-1] = num_values - int(lengths[:-1].sum())
    weights = torch.rand(num_values, generator=generator)
    features = [Bags(num_values, lengths), Bags(num_values), Bags(num_values, lengths, weights, is_mean=True)]
    together = index.repeat(3)
    moved = [on(device, feature) for feature in features]
    pooled = pool_rows(source.to(device), together.to(device), moved)
    for found, expected in zip(pooled, reference_pool.pool_rows(source, together, features), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
    keys, moved_keys = sort_unique(together), sort_unique(together.to(device))
    grads = [torch.randn(feature.num_bags, dim, generator=generator) for feature in features]
    found = pool_rows_backward([grad.to(device) for grad in grads], moved, moved_keys, dim)
    expected = reference_pool.pool_rows_backward(grads, features, keys, dim)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
    values = torch.randn(together.numel(), dim, generator=generator)
    sums = [segment_sum(values.to(device), moved_keys, 0.5) for _ in range(2)]
    assert torch.equal(*sums)
    torch.testing.assert_close(
        sums[0].cpu(), reference_sum.segment_sum(values, keys, 0.5), rtol=1e-4, atol=1e-4
    )  # fmt: skip


@pytest.mark.parametrize("bound", [0.7, math.inf])
@pytest.mark.parametrize("second_kind", ["none", "row", "element"])
@pytest.mark.parametrize("has_first", [False, True])
@pytest.mark.parametrize("dim", DIMS)
def test_updates(device: torch.device, dim: int, has_first: bool, second_kind: str, bound: float) -> None:
    generator = torch.Generator().manual_seed(dim)
    weight, first, elements, grad = torch.randn(4, 500, dim, generator=generator)
    rows = torch.randperm(500, generator=generator)[:300]
    seconds = {"none": None, "row": elements[:, 0].abs(), "element": elements.abs()}
    given = [weight, first if has_first else None, seconds[second_kind]]
    expected, found = ([None if t is None else t.clone().to(d) for t in given] for d in ("cpu", device))
    step = RowStep(lr=0.1, weight_decay=0.1, max_row_grad_norm=bound, max_norm=bound)
    moments = Moments(first_decay=0.9, second_decay=0.9, second_gain=0.1, eps=1e-6)
    reference_update.moment_update(*expected, rows, grad[:300], step, moments)
    moment_update(*found, rows.to(device), grad[:300].to(device), step, moments)
    for ours, theirs in zip(found, expected, strict=True):
        if ours is not None:
            torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-5, atol=2e-6)


def test_bfloat16_rows_round_as_on_the_cpu(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, grad = torch.randn(2, 100, 100, generator=generator)
    rows, keys, second = torch.arange(100), mix64(torch.arange(100)), torch.ones(100)

    def updated(device: torch.device | str) -> Tensor:
        stored = weight.bfloat16().to(device)
        step = RowStep(lr=0.1, rounding_keys=keys.to(device))
        moment_update(stored, None, second.clone().to(device), rows.to(device), grad.to(device), step, Moments())
        return stored.cpu()

    # The last bit of a float32 value may differ, and then, rarely, its rounding.
    assert (updated(device) == updated("cpu")).float().mean() > 0.99


@pytest.mark.parametrize("shape", SHAPES)
def test_skipgram(device: torch.device, shape: tuple[int, ...]) -> None:
    vectors, block = make(*shape)
    names = ("inputs", "targets", "starts", "stops")
    moved = TextBlock(*(getattr(block, name).to(device) for name in names), reach=reach_of(block.starts, block.stops))
    expected = reference_skipgram.skipgram_block(vectors, block, "skipgram", 1.0)
    found = [skipgram_block(vectors.to(device), moved) for _ in range(2)]
    for ours, theirs in zip(found[0], expected, strict=True):
        # Three products in tf32 stand for one in float32.
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize("key", [0, -(1 << 63), 123456789])
@pytest.mark.parametrize("num_kept", [None, "told"])
def test_a_text_is_sampled_as_on_the_cpu(device: torch.device, key: int, num_kept: str | None) -> None:
    tokens, positions, tables = make_text(3000, 500)
    parts = (torch.arange(3000) // 7 % 2).int()
    options = {"window": 5, "num_negatives": 5, "key": key}
    expected = reference_sample.sample_text(tokens, positions, parts, tables, 5, 5, key)
    if num_kept is not None:
        options["num_kept"] = expected.words.numel()
    moved = (each.to(device) for each in (tokens, positions))
    found = sample_text(*moved, tables.to(device), parts=parts.to(device), **options)
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name).cpu(), value), name


def test_offsets_beyond_two_billion_elements(device: torch.device) -> None:
    num_rows, dim = (1 << 31) // 64 + 1000, 64
    if torch.cuda.mem_get_info()[0] < 3 * num_rows * dim:
        pytest.skip("needs 6 GiB of the GPU's memory")
    table = torch.zeros(num_rows, dim, dtype=torch.bfloat16, device=device)
    rows = torch.tensor([num_rows - 1, 0, num_rows - 7], device=device)
    step = RowStep(lr=1.0, rounding_keys=rows)
    moment_update(table, None, None, rows, -torch.ones(3, dim, device=device), step, Moments())
    assert (gather_rows(table, rows, torch.float32) == 1).all()
    assert int(table[1 : num_rows - 7].count_nonzero()) == 0
