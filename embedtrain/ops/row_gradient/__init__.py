"""The gradient of the rows that a step touched: kept as backward delivered it, and summed by row on demand.

The native updates sum and damp gradients while they update the rows. So they do not write the sums to memory and read
them again, which would move more bytes than the rows themselves.
"""

from __future__ import annotations

import copy
import functools
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.damp_rows import Damping, damp_rows
from embedtrain.ops.pool_rows import Bags, pool_rows_backward
from embedtrain.ops.pool_rows.native import describe
from embedtrain.ops.row_gradient import native, reference
from embedtrain.ops.row_gradient.types import Delivery, Run
from embedtrain.ops.sort_unique import SortedKeys, sort_unique

__all__ = ["Delivery", "RowGradient", "Run"]

_LARGEST_FLOAT = torch.finfo(torch.float32).max


class RowGradient:
    """Holds the gradients of one or more backward passes until an optimizer applies them.

    Args:
        deliveries: the gradients of one or more backward passes.
        num_rows: upper bound of the row numbers, exclusive.
        dim: dimension of the rows.
        factor: multiplies every sum.

    Attributes:
        bags: the features of all deliveries.
        grads: one tensor per feature; the gradients of its pooled vectors.
        is_padded: whether row numbers outside the table, with zero gradients, follow the touched rows; see `padded`.
        is_summed: whether `sums` needs no summation.
        damping: how `values` differ from `sums`; None if they do not. See `damped`.

    Raises:
        ValueError: shapes or dtypes disagree.
        RuntimeError: a gradient was changed in place after backward.
    """

    def __init__(self, deliveries: Sequence[Delivery], *, num_rows: int, dim: int, factor: float = 1.0) -> None:
        for delivery in deliveries:
            delivery.check_unchanged()
            delivery.check_shapes(dim)
        self._deliveries = list(deliveries)
        self.num_rows, self.dim, self.factor = num_rows, dim, factor
        self.bags = [feature for delivery in deliveries for feature in delivery.bags]
        self.grads = [grad for delivery in deliveries for grad in delivery.grads]
        self.is_padded = False
        self.damping: Damping | None = None
        self.is_summed = len(self._deliveries) == 1 and self._deliveries[0].is_unique and factor == 1.0

    @classmethod
    def of_rows(cls, rows: Tensor, values: Tensor, num_rows: int) -> RowGradient:
        """Returns the gradient of distinct rows, given rows [n] int64 and values [n, dim] float32."""
        return cls([Delivery.of_rows(rows, values)], num_rows=num_rows, dim=values.shape[1])

    def damped(self, damping: Damping) -> RowGradient:
        """Returns the gradient with damped values. The native updates compute them a few rows at a time.

        Raises:
            ValueError: shapes, dtypes or devices disagree, or the gradient is damped already.
        """
        if self.damping is not None:
            raise ValueError("the gradient is damped already")
        damping.check(self.count_rows(), self.dim, self.device)
        found = copy.copy(self)
        found.__dict__.pop("values", None)
        found.damping = damping
        return found

    def padded(self) -> RowGradient:
        """Returns the gradient with padding, for kernels that ignore row numbers outside the table.

        A padded gradient has as many rows as values, so the host need not wait for the number of distinct rows. The
        method returns the gradient itself if padding would not help or would cost too much:

        - The host knows the number of distinct rows already.
        - The sums are computed already, and the caller may have changed them.
        - The gradient is damped, because damping has an entry for each distinct row.
        - The padded sums would take more than twice the memory of the delivered gradients, as with long bags.
        """
        ordered = self._deliveries[0].ordered if len(self._deliveries) == 1 else None
        has_known = (
            self.is_summed
            or self.damping is not None
            or ordered is None
            or ordered.is_counted
            or "sums" in self.__dict__
        )
        if has_known or not dispatch.uses_triton(self.rows_of_values):
            return self
        if self.rows_of_values.numel() > 2 * sum(feature.num_bags for feature in self.bags):
            return self
        found = RowGradient(self._deliveries, num_rows=self.num_rows, dim=self.dim, factor=self.factor)
        found.is_padded = True
        return found

    @property
    def device(self) -> torch.device:
        """The device of rows and gradients."""
        return self._deliveries[0].rows.device

    @property
    def rows(self) -> Tensor:
        """[n] int64; the distinct rows, in ascending order unless `of_rows` got them in another order."""
        return self._deliveries[0].rows if self.is_summed else self._keys.unique

    def count_rows(self) -> int:
        """Returns the number of `rows`; waits for the device if necessary."""
        return self.rows.numel()

    @functools.cached_property
    def values(self) -> Tensor:
        """[n, dim] float32; the gradient of each row: its sum, damped if there is a damping."""
        return self.sums if self.damping is None else damp_rows(self.sums, self.damping)

    @functools.cached_property
    def sums(self) -> Tensor:
        """[n, dim] float32; the summed gradient of each row. Duplicates are added in order of delivery."""
        if self.is_summed:
            (grad,) = self._deliveries[0].grads
            assert grad is not None
            return grad
        return pool_rows_backward(self.grads, self.bags, self._keys, self.dim, self.factor)

    @property
    def unsummed_keys(self) -> SortedKeys | None:
        """The sorted rows of the values, for updates that sum the gradients themselves; None if the sums are known."""
        return None if self.is_summed or "sums" in self.__dict__ else self._keys

    @functools.cached_property
    def counts(self) -> Tensor | None:
        """[n] float32; number of loss terms in each row's gradient; None unless all deliveries have counts."""
        told = [delivery.counts for delivery in self._deliveries if delivery.counts is not None]
        if len(told) < len(self._deliveries):
            return None
        counts = told[0] if len(told) == 1 else torch.cat(told)
        if self.is_summed:
            return counts
        return pool_rows_backward([counts.unsqueeze(1)], [Bags(counts.numel())], self._keys, 1).squeeze(1)

    @functools.cached_property
    def rows_of_values(self) -> Tensor:
        """[num_values] int64; the row of each value, in order of delivery."""
        rows = [delivery.rows for delivery in self._deliveries]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    @property
    def runs(self) -> Sequence[Run]:
        """Runs of the values; empty if they are not known."""
        return self._deliveries[0].runs if len(self._deliveries) == 1 else ()

    @functools.cached_property
    def native_features(self) -> tuple[array[int], list[Tensor]]:
        """The features in the layout of the native kernels, and the tensors that must stay alive with it."""
        return describe(self.bags, self.grads)

    def is_finite(self) -> bool:
        """Returns whether every element of `values` is finite; sums them only if a quick bound does not show it."""
        num_values = sum([feature.num_values for feature in self.bags])
        grad, weight = self._largest_magnitudes()
        if grad * weight * num_values * abs(self.factor) <= _LARGEST_FLOAT:
            return True
        return bool(self.values.isfinite().all())

    def sum_of_squares(self) -> float:
        """Returns the sum of squares of `values`; not finite if an element is not."""
        flat = self.values.flatten()
        squares = float(torch.dot(flat, flat))
        if squares < _LARGEST_FLOAT:
            return squares
        # Large finite float32 values overflow the float32 sum, but not a sum in float64.
        return float(torch.linalg.vector_norm(flat, dtype=torch.float64)) ** 2

    @functools.cached_property
    def _keys(self) -> SortedKeys:
        ordered = self._deliveries[0].ordered if len(self._deliveries) == 1 else None
        if ordered is not None:
            return ordered.padded(self.num_rows) if self.is_padded else ordered.sorted
        return sort_unique(self.rows_of_values, bound=self.num_rows, with_inverse=False)

    def _largest_magnitudes(self) -> tuple[float, float]:
        """Returns the largest magnitude of the gradients, and the largest of the weights' magnitudes and 1."""
        if self.bags and dispatch.uses_native(self._deliveries[0].rows):
            features, _ = self.native_features
            return native.largest_magnitudes(features, len(self.bags), self.dim)
        return reference.largest_magnitudes(self.bags, self.grads)
