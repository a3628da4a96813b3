"""Damps the gradients of rows along a few directions of high curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.damp_rows import native, reference

__all__ = ["damp_rows"]


def damp_rows(grad: Tensor, tables: Tensor, times: Tensor, curvatures: Tensor, directions: Tensor) -> Tensor:
    """Scales each gradient's component along each direction by `(1 - exp(-x)) / x`, where `x = time * curvature`.

    Along a direction of curvature `c`, gradient flow covers the fraction `1 - exp(-t * c)` of the way to the minimum in
    time `t`. One step of size `t` along the gradient covers `t * c`. The factor is the quotient of the two.

    Args:
        grad: [n, dim] float32; the gradient of each row.
        tables: [n] int64; index of the table whose directions apply to each row.
        times: [n] float32, not negative; 0 leaves a row's gradient unchanged.
        curvatures: [num_tables, k] float32; negative values count as 0.
        directions: [num_tables, k, dim] float32; k orthonormal vectors per table.

    Returns:
        [n, dim] float32, a new tensor.

    Raises:
        ValueError: shapes or dtypes disagree.
        IndexError: an element of `tables` is out of range. Not checked on a GPU, because it would need a device sync.
    """
    _check(grad, tables, times, curvatures, directions)
    if dispatch.uses_triton(grad):
        from embedtrain.ops.damp_rows import triton

        return triton.damp_rows(grad, tables, times, curvatures, directions)
    if dispatch.uses_native(grad):
        return native.damp_rows(grad, tables, times, curvatures, directions)
    return reference.damp_rows(grad, tables, times, curvatures, directions)


def _check(grad: Tensor, tables: Tensor, times: Tensor, curvatures: Tensor, directions: Tensor) -> None:
    n, dim = grad.shape
    if tables.shape != (n,) or times.shape != (n,) or tables.dtype != torch.int64:
        raise ValueError(
            f"expected tables int64 and times float32 [{n}], got {tables.dtype} {tuple(tables.shape)} and "
            f"{times.dtype} {tuple(times.shape)}"
        )
    if curvatures.dim() != 2 or directions.shape != (*curvatures.shape, dim):
        raise ValueError(
            f"expected curvatures [num_tables, k] and directions [num_tables, k, {dim}], got "
            f"{tuple(curvatures.shape)} and {tuple(directions.shape)}"
        )
    for name, tensor in (("grad", grad), ("times", times), ("curvatures", curvatures), ("directions", directions)):
        if tensor.dtype != torch.float32:
            raise ValueError(f"expected {name} float32, got {tensor.dtype}")
