"""A batch of bags of ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Jagged:
    """The ids of a batch for one feature, bag after bag.

    Attributes:
        values: [num_values] int64 ids.
        lengths: [num_bags] int64; how many of the values each bag holds, zeros allowed.
        weights: [num_values] float32, or None: the factor of each id's vector when its bag is pooled.
    """

    values: Tensor
    lengths: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        if self.values.dim() != 1 or self.lengths.dim() != 1:
            raise ValueError(
                f"values and lengths must be one-dimensional, got shapes {tuple(self.values.shape)} "
                f"and {tuple(self.lengths.shape)}"
            )
        for name, tensor in (("values", self.values), ("lengths", self.lengths)):
            if tensor.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"{name} must be int64 or int32, got {tensor.dtype}")
        if self.weights is not None and self.weights.shape != self.values.shape:
            raise ValueError(
                f"weights must have the shape of values, {tuple(self.values.shape)}, got {tuple(self.weights.shape)}"
            )
        if self.lengths.numel() and int(self.lengths.min()) < 0:
            raise ValueError(f"lengths must not be negative, got {int(self.lengths.min())}")
        if int(self.lengths.sum()) != self.values.numel():
            raise ValueError(f"lengths must add up to the {self.values.numel()} values, got {int(self.lengths.sum())}")

    @classmethod
    def from_ids(cls, ids: Tensor) -> Jagged:
        """Wraps ids [n] as n bags of one id each."""
        # One number that all bags share: writing it for each took longer than many a look-up.
        return cls(ids, torch.ones((), dtype=torch.int64, device=ids.device).expand(ids.numel()))

    @classmethod
    def from_lists(cls, bags: Sequence[Sequence[int]], *, device: torch.device | str = "cpu") -> Jagged:
        """Builds a batch from one sequence of ids a bag."""
        values = torch.tensor([i for bag in bags for i in bag], dtype=torch.int64, device=device)
        lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int64, device=device)
        return cls(values, lengths)

    @property
    def num_bags(self) -> int:
        """Number of bags, empty ones included."""
        return self.lengths.numel()

    def bag_of_values(self) -> Tensor:
        """Returns, for each value, the position of its bag; [num_values] int64."""
        bags = torch.arange(self.num_bags, device=self.lengths.device)
        return torch.repeat_interleave(bags, self.lengths)


def places_of_runs(firsts: Tensor, lengths: Tensor) -> Tensor:
    """Returns the places of several runs of values, run after run; [sum(lengths)] int64.

    Args:
        firsts: [n] int64; where each run begins.
        lengths: [n] int64; how many values it has.
    """
    num_places = int(lengths.sum())
    before = lengths.cumsum(0) - lengths
    steps = torch.repeat_interleave(firsts - before, lengths, output_size=num_places)
    return torch.arange(num_places, device=lengths.device) + steps
