"""The largest eigenvalues of small symmetric matrices, and their eigenvectors."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.top_eigenpairs import native, reference

__all__ = ["top_eigenpairs"]


def top_eigenpairs(matrices: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Approximates the largest eigenvalues and their eigenvectors by power iteration, without a device sync.

    The iteration takes the 32nd power of a matrix: if an eigenvalue is 0.9 times the next larger one, 3 % of its
    eigenvector remains in the result for the larger one. Eigenvectors with nearly equal eigenvalues may come out mixed.

    Args:
        matrices: [m, dim, dim] float32; symmetric, without negative eigenvalues.
        number: number of eigenpairs; at most dim are returned.

    Returns:
        values: [m, number] float32; 0 for a matrix of zeros.
        vectors: [m, number, dim] float32; orthonormal, or zeros in place of eigenvectors whose eigenvalue is 0. Equal
            matrices give equal vectors.

    Raises:
        ValueError: the matrices are not square or not float32, or the number is negative.
    """
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2]:
        raise ValueError(f"expected matrices [m, dim, dim], got {tuple(matrices.shape)}")
    if matrices.dtype != torch.float32 or number < 0:
        raise ValueError(f"expected float32 matrices and a number of at least 0, got {matrices.dtype} and {number}")
    number = min(number, matrices.shape[1])
    if dispatch.uses_triton(matrices):
        from embedtrain.ops.top_eigenpairs import triton

        return triton.top_eigenpairs(matrices, number)
    if dispatch.uses_native(matrices):
        return native.top_eigenpairs(matrices, number)
    return reference.top_eigenpairs(matrices, number)
