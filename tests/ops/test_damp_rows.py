"""Damping against its definition in float64, in every implementation."""

from __future__ import annotations

import pytest
import torch

from embedtrain.ops.damp_rows import damp_rows
from embedtrain.ops.skipgram_block import count_of_rows
from tests.ops.test_skipgram_block import SHAPES, make


@pytest.mark.parametrize(("num_rows", "dim", "k"), [(0, 3, 1), (1, 1, 1), (37, 33, 4), (2100, 64, 5), (9, 17, 4)])
def test_each_direction_moves_as_far_as_small_steps_would(
    threaded_backend: str, num_rows: int, dim: int, k: int
) -> None:
    if threaded_backend == "triton" and num_rows > 100:
        pytest.skip("the interpreter takes seconds")
    generator = torch.Generator().manual_seed(dim)
    grad = torch.randn(num_rows, dim, generator=generator)
    tables = torch.randint(0, 2, (num_rows,), generator=generator)
    times = torch.rand(num_rows, generator=generator) ** 4 * 100  # from far below the switch of formulas to far above
    times[::5] = 0
    curvatures = torch.rand(2, k, generator=generator)
    curvatures[1, 0] = -1e-9  # as rounding leaves a curvature of 0
    directions = torch.linalg.qr(torch.randn(2, dim, k, generator=generator)).Q.mT.contiguous()
    before = grad.clone()
    found = damp_rows(grad, tables, times, curvatures, directions)
    x = (times[:, None] * curvatures.clamp(min=0)[tables]).double()
    shares = torch.where(x > 0, -torch.expm1(-x) / x, 1.0)
    own = directions[tables].double()  # [n, k, dim]
    along = torch.einsum("nkd,nd->nk", own, before.double())
    expected = before.double() + torch.einsum("nk,nkd->nd", (shares - 1) * along, own)
    assert torch.equal(grad, before), "the gradient is the caller's"
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=2e-6)
    assert torch.equal(found[::5], grad[::5])


def test_a_table_without_directions_is_refused(backend: str) -> None:
    if backend == "triton":
        pytest.skip("a GPU would have to wait to look")
    one = torch.ones(1)
    with pytest.raises(IndexError):
        damp_rows(one.view(1, 1), torch.tensor([2]), one, one.view(1, 1), one.view(1, 1, 1))


@pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_a_plain_loop(shape: tuple[int, ...], architecture: str) -> None:
    vectors, block = make(*shape)
    expected = torch.zeros(len(vectors), dtype=torch.float64)
    for centre in range(block.num_positions):
        around = [p for p in range(int(block.starts[centre]), int(block.stops[centre])) if p != centre]
        for target in block.targets[centre].tolist():
            share = 1 if architecture == "skipgram" or not around else 1 / len(around)
            for context in around:
                expected[block.inputs[context]] += share
                expected[target] += share
    found = count_of_rows(block, len(vectors), architecture)  # type: ignore[arg-type]
    # Shares of a prediction are counted in parts of 1,024.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0 if architecture == "skipgram" else 0.2)
