"""The description of bags that are pooled."""

from __future__ import annotations

import torch
from torch import Tensor


class Bags:
    """Describes how the values of one feature are pooled.

    Attributes:
        num_values: number of values in all bags.
        lengths: [num_bags] int64 contiguous, adding up to `num_values`; None for one value per bag.
        weights: [num_values] float32 contiguous; multiplies the row of each value. None for no weights.
        is_mean: whether a bag's sum is divided by its length.
        num_bags: number of bags, including empty ones.

    Raises:
        ValueError: shapes or dtypes disagree.
    """

    __slots__ = ("is_mean", "lengths", "num_bags", "num_values", "weights")  # each step makes one per feature

    def __init__(
        self, num_values: int, lengths: Tensor | None = None, weights: Tensor | None = None, is_mean: bool = False
    ) -> None:
        if lengths is not None and (lengths.dtype != torch.int64 or lengths.dim() != 1):
            raise ValueError(f"expected lengths [num_bags] int64, got {lengths.dtype} {tuple(lengths.shape)}")
        if weights is not None and (weights.dtype != torch.float32 or weights.shape != (num_values,)):
            raise ValueError(f"expected weights [{num_values}] float32, got {weights.dtype} {tuple(weights.shape)}")
        self.num_values, self.is_mean = num_values, is_mean
        self.lengths = None if lengths is None else lengths.contiguous()
        self.weights = None if weights is None else weights.contiguous()
        self.num_bags = num_values if lengths is None else lengths.numel()
