"""Damps the gradients of rows along a few directions of high curvature.

On a CPU, the native row updates damp each gradient while they update its row, so there is no native kernel here.
"""

from __future__ import annotations

from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.damp_rows import reference
from embedtrain.ops.damp_rows.types import Damping

__all__ = ["Damping", "damp_rows"]


def damp_rows(grad: Tensor, damping: Damping) -> Tensor:
    """Returns damped gradients.

    Args:
        grad: [n, dim] float32; the gradient of each row.
        damping: how each gradient is damped.

    Returns:
        [n, dim] float32, a new tensor.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        IndexError: an element of `damping.tables` is out of range. Not checked on a GPU, because it would need a device
            sync.
    """
    damping.check(grad.shape[0], grad.shape[1], grad.device)
    if dispatch.uses_triton(grad):
        from embedtrain.ops.damp_rows import triton

        return triton.damp_rows(grad, damping)
    damping.check_tables()
    return reference.damp_rows(grad, damping)
