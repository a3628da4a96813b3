"""The weighted sum of outer products against float64, in every implementation."""

from __future__ import annotations

import pytest
import torch

from embedtrain.ops._backend.library import PATH
from embedtrain.ops.weighted_square import weighted_square


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "dim"), [(0, 3), (1, 1), (37, 33), (300, 100), (2100, 64), (90, 21), (5, 0)])
def test_it_is_the_sum_of_outer_products(threaded_backend: str, n: int, dim: int, dtype: torch.dtype) -> None:
    if threaded_backend == "triton" and n > 100:
        pytest.skip("the interpreter takes seconds")
    generator = torch.Generator().manual_seed(n)
    source = torch.randn(n + 5, dim, generator=generator).to(dtype)
    rows = torch.randint(0, n + 5, (n,), generator=generator)
    weights = torch.randint(0, 50, (n,), generator=generator).float()
    found = weighted_square(source, rows, weights)
    own = source[rows].double()
    expected = (own * weights.double()[:, None]).T @ own
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(weights.sum() + 1))
    if threaded_backend not in ("reference", "triton"):
        assert torch.equal(found, found.T)


@pytest.mark.skipif(not PATH.exists(), reason="only the native kernel promises it")
def test_the_number_of_threads_changes_no_bit() -> None:
    source, rows = torch.randn(5000, 100), torch.arange(5000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(weighted_square(source, rows, torch.ones(5000)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_does_not_fit_is_refused(backend: str) -> None:
    source = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"expected weights \[1\] float32, got torch.float32 \(2,\)"):
        weighted_square(source, torch.tensor([0]), torch.ones(2))
    with pytest.raises(ValueError, match=r"expected rows \[n\] int64, got torch.int32"):
        weighted_square(source, torch.tensor([0], dtype=torch.int32), torch.ones(1))
    if backend != "triton":  # a GPU would have to wait to look
        with pytest.raises(IndexError):
            weighted_square(source, torch.tensor([3]), torch.ones(1))
