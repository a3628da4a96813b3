"""Calls the native power iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import library


def top_eigenpairs(matrices: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """See `embedtrain.ops.top_eigenpairs`."""
    matrices = matrices.contiguous()
    num, dim = matrices.shape[:2]
    values = torch.empty(num, number, dtype=torch.float32)
    vectors = torch.empty(num, number, dim, dtype=torch.float32)
    library.get().embedtrain_top_eigenpairs(
        matrices.data_ptr(), num, dim, number, values.data_ptr(), vectors.data_ptr()
    )
    return values, vectors
