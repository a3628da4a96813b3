"""Eigenpairs by power iteration against `eigh`, in every implementation."""

from __future__ import annotations

import pytest
import torch

from embedtrain.ops.top_eigenpairs import top_eigenpairs

# The largest eigenvalues as they are among word vectors: after some steps, and after few.
LARGEST = {"later": [1.76, 0.25, 0.18, 0.13], "early": [1.28, 0.025, 0.0058, 0.0034], "flat": [1.0, 1e-3, 5e-4, 3e-4]}


@pytest.mark.parametrize(
    ("kind", "dim", "number"),
    [
        ("later", 20, 4),
        ("flat", 20, 4),
        *(pytest.param(kind, *size, marks=pytest.mark.slow) for kind in LARGEST for size in ((33, 3), (100, 4))),
    ],
)
def test_the_largest_ones_are_found(backend: str, kind: str, dim: int, number: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    largest = torch.tensor(LARGEST[kind], dtype=torch.float64)
    rest = largest[-1] * torch.linspace(0.7, 0.1, dim - 4, dtype=torch.float64)
    bases = torch.linalg.qr(torch.randn(2, dim, dim, generator=generator, dtype=torch.float64)).Q
    matrices = (bases * torch.cat([largest, rest])) @ bases.mT
    values, vectors = top_eigenpairs(matrices.float(), number)
    assert values.shape == (2, number) and vectors.shape == (2, number, dim)
    torch.testing.assert_close(values.double(), largest[:number].expand(2, -1), rtol=1e-3, atol=0)
    inside = (vectors.double() @ bases[:, :, :4]).square().sum(dim=2)
    torch.testing.assert_close(inside, torch.ones(2, number, dtype=torch.float64), rtol=1e-2, atol=0)
    torch.testing.assert_close(vectors @ vectors.mT, torch.eye(number).expand(2, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, *(pytest.param(scale, marks=pytest.mark.slow) for scale in (1e-12, 1e12))])
def test_vectors_of_a_matrix_of_rank_one_stay_orthogonal(backend: str, scale: float) -> None:
    vector = torch.nn.functional.normalize(torch.linspace(-1, 2, 24), dim=0)
    values, vectors = top_eigenpairs(scale * torch.outer(vector, vector)[None], 4)
    assert float(values[0, 0]) == pytest.approx(scale, rel=1e-5)
    assert float((vectors[0, 0] @ vector).abs()) == pytest.approx(1, rel=1e-5)
    # Else the first eigenvalue would count twice.
    assert float(values[0, 1:].abs().max()) < 1e-5 * scale
    products = vectors[0] @ vectors[0].T
    assert float((products - products.diag().diag()).abs().max()) < 1e-5


@pytest.mark.parametrize("number", [4, 2])
def test_a_matrix_of_zeros_has_none(backend: str, number: int) -> None:
    values, vectors = top_eigenpairs(torch.zeros(1, 2, 2), number)
    assert values.tolist() == [[0.0, 0.0]] and vectors.shape == (1, 2, 2)
    assert bool(vectors.isfinite().all())


def test_a_matrix_that_is_not_square_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected matrices \[m, dim, dim\], got \(1, 2, 3\)"):
        top_eigenpairs(torch.zeros(1, 2, 3), 1)
    for matrix, number in ((torch.zeros(1, 2, 2, dtype=torch.float64), 1), (torch.zeros(1, 2, 2), -1)):
        with pytest.raises(ValueError, match="expected float32 matrices and a number of at least 0"):
            top_eigenpairs(matrix, number)
