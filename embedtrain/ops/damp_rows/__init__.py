"""Damps the gradients of rows along a few directions of high curvature."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.damp_rows import native, reference

__all__ = ["damp_rows"]


def damp_rows(grad: Tensor, tables: Tensor, times: Tensor, curvatures: Tensor, directions: Tensor) -> Tensor:
    """Returns the gradients with each direction's part scaled by `(1 - exp(-x)) / x`, `x = time * curvature`.

    Gradient flow along a direction of curvature `c` covers the share `1 - exp(-t * c)` of the way to the minimum in
    time `t`, and one step along the gradient `t * c`: the quotient of the two.

    Args:
        grad: [n, dim] float32; the gradient of each row.
        tables: [n] int64; which directions hold for each row.
        times: [n] float32, not negative; 0 leaves a row's gradient as it is.
        curvatures: [num_tables, k] float32; negative ones count as 0.
        directions: [num_tables, k, dim] float32; k orthonormal vectors for each table.

    Returns:
        [n, dim] float32, in memory of its own.

    Raises:
        ValueError: shapes or dtypes disagree.
        IndexError: one of `tables` is not below `num_tables`. On a GPU they are the caller's promise: the host would
            have to wait for the device to look at them.
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
