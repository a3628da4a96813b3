"""The gradients of rows in the form in which a backward pass delivers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from embedtrain.ops.pool_rows import Bags
from embedtrain.ops.sort_unique import OrderedKeys


class Run(NamedTuple):
    """Describes consecutive values whose rows lie in one range; later runs have larger rows.

    Attributes:
        num_values: number of values.
        first_row: first row of the range.
        num_rows: length of the range.
    """

    num_values: int
    first_row: int
    num_rows: int


class Delivery:
    """Holds the gradients of rows from one backward pass, without summing or copying them.

    Args:
        rows: [n] int64; the row of each value, ordered by feature.
        bags: the features.
        grads: one tensor per feature, [num_bags, dim] float32: the gradient of its pooled vectors. None stands for
            zeros.
        runs: runs that cover all values, if the caller knows them; they make sorting faster.
        is_unique: whether the rows are distinct and ascending, with one feature of one unweighted value per bag.
        ordered: the sorted rows, if the caller has sorted them already.
        counts: [n] float32; the number of loss terms in each value's gradient. None if it was not counted.
    """

    def __init__(
        self,
        rows: Tensor,
        bags: Sequence[Bags],
        grads: Sequence[Tensor | None],
        *,
        runs: Sequence[Run] = (),
        is_unique: bool = False,
        ordered: OrderedKeys | None = None,
        counts: Tensor | None = None,
    ) -> None:
        self.rows, self.bags, self.grads, self.counts = rows, bags, grads, counts
        self.runs, self.is_unique, self.ordered = runs, is_unique, ordered
        self._versions = [0 if grad is None else grad._version for grad in grads]

    @classmethod
    def of_rows(cls, rows: Tensor, values: Tensor, counts: Tensor | None = None) -> Delivery:
        """Returns a delivery for distinct rows, given rows [n] int64 and values [n, dim] float32."""
        return cls(rows, [Bags(rows.numel())], [values], is_unique=True, counts=counts)

    def replace(self, grads: Sequence[Tensor | None]) -> None:
        """Replaces the gradients by equal ones in other memory.

        Raises:
            RuntimeError: a gradient was changed in place after backward.
        """
        self.check_unchanged()
        self.grads = grads
        self._versions = [0 if grad is None else grad._version for grad in grads]

    def check_shapes(self, dim: int) -> None:
        """Raises ValueError if shapes or dtypes disagree."""
        num_values = sum([feature.num_values for feature in self.bags])
        if self.rows.shape != (num_values,) or self.rows.dtype != torch.int64:
            raise ValueError(f"expected rows [{num_values}] int64, got {self.rows.dtype} {tuple(self.rows.shape)}")
        if self.counts is not None and (self.counts.shape != (num_values,) or self.counts.dtype != torch.float32):
            raise ValueError(
                f"expected counts [{num_values}] float32, got {self.counts.dtype} {tuple(self.counts.shape)}"
            )
        for feature, grad in zip(self.bags, self.grads, strict=True):
            if grad is not None and (grad.shape != (feature.num_bags, dim) or grad.dtype != torch.float32):
                raise ValueError(
                    f"expected a gradient [{feature.num_bags}, {dim}] float32, got {grad.dtype} {tuple(grad.shape)}"
                )

    def check_unchanged(self) -> None:
        """Raises RuntimeError if a gradient was changed in place after backward."""
        for grad, version in zip(self.grads, self._versions, strict=True):
            if grad is not None and grad._version != version:
                raise RuntimeError(
                    "a gradient of looked-up vectors was changed in place between backward and step(), which reads it: "
                    "change a clone of it, or change it after step()"
                )
