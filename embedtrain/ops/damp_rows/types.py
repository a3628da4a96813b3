"""Damping of gradients: how strong, and along which directions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.ops._backend import library


class Damping(NamedTuple):
    """Describes how the gradient of each row is damped along the directions of its table.

    Along a direction of curvature `c`, gradient flow covers the fraction `1 - exp(-t * c)` of the way to the minimum in
    time `t`. One step of size `t` along the gradient covers `t * c`. Damping multiplies the gradient's component along
    the direction by the quotient of the two, `(1 - exp(-t * c)) / (t * c)`.

    Attributes:
        tables: [n] int64; index of the table whose directions apply to each row.
        times: [n] float32, not negative; 0 leaves a row's gradient unchanged.
        curvatures: [num_tables, k] float32; negative values count as 0.
        directions: [num_tables, k, dim] float32; k orthonormal vectors per table.
    """

    tables: Tensor
    times: Tensor
    curvatures: Tensor
    directions: Tensor

    def check(self, num_rows: int, dim: int, device: torch.device) -> None:
        """Raises ValueError if shapes, dtypes or devices do not fit gradients [num_rows, dim] on a device."""
        n = num_rows
        if self.tables.shape != (n,) or self.times.shape != (n,) or self.tables.dtype != torch.int64:
            raise ValueError(
                f"expected tables int64 and times float32 [{n}], got {self.tables.dtype} {tuple(self.tables.shape)} "
                f"and {self.times.dtype} {tuple(self.times.shape)}"
            )
        if self.curvatures.dim() != 2 or self.directions.shape != (*self.curvatures.shape, dim):
            raise ValueError(
                f"expected curvatures [num_tables, k] and directions [num_tables, k, {dim}], got "
                f"{tuple(self.curvatures.shape)} and {tuple(self.directions.shape)}"
            )
        for name in ("times", "curvatures", "directions"):
            if (dtype := getattr(self, name).dtype) != torch.float32:
                raise ValueError(f"expected {name} float32, got {dtype}")
        for name, tensor in self._asdict().items():
            if tensor.device != device:
                raise ValueError(f"expected {name} on {device}, got {tensor.device}")

    def check_tables(self) -> None:
        """Raises IndexError if a table is out of range; waits for the device."""
        num_tables = len(self.curvatures)
        if self.tables.numel() and not 0 <= self.tables.min() <= self.tables.max() < num_tables:
            raise library.outside_error("tables", self.tables, num_tables)

    def contiguous(self) -> Damping:
        """Returns the damping with contiguous tensors."""
        return Damping(*(tensor.contiguous() for tensor in self))
