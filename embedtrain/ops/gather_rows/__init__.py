"""Copies random rows of a table into a compact tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.gather_rows import native, reference


def gather_rows(source: Tensor, rows: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None) -> Tensor:
    """Copies rows and converts their dtype if necessary.

    Args:
        source: [num_rows, dim] float32 or bfloat16, contiguous.
        rows: [n] int64, all in [0, num_rows).
        dtype: dtype of the result, float32 or bfloat16. None takes the dtype of `out`, or of `source` without `out`.
        out: [n, dim] contiguous; receives the rows. None allocates a new tensor.

    Returns:
        [n, dim]; `out` if it is given.

    Raises:
        ValueError: shapes or dtypes disagree.
        IndexError: a row is out of range. The Triton kernels do not check, because it would need a device sync.
    """
    dtype = dtype or (source.dtype if out is None else out.dtype)
    if source.dim() != 2 or rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(
            f"expected source [num_rows, dim] and rows [n] int64, got {tuple(source.shape)} and "
            f"{rows.dtype} {tuple(rows.shape)}"
        )
    if not {source.dtype, dtype} <= {torch.float32, torch.bfloat16}:
        raise ValueError(f"rows and their copy must be float32 or bfloat16, got {source.dtype} and {dtype}")
    if out is not None and (out.shape != (rows.numel(), source.shape[1]) or out.dtype != dtype):
        raise ValueError(
            f"expected out [{rows.numel()}, {source.shape[1]}] {dtype}, got {tuple(out.shape)} {out.dtype}"
        )
    if dispatch.uses_native(source):
        return native.gather_rows(source, rows, dtype, out)
    if dispatch.uses_triton(source):
        from embedtrain.ops.gather_rows import triton

        return triton.gather_rows(source, rows, dtype, out)
    gathered = reference.gather_rows(source, rows, dtype)
    return gathered if out is None else out.copy_(gathered)
