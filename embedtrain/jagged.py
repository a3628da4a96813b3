"""Batches of bags of ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Jagged:
    """Holds the ids of a batch for one feature, bag by bag.

    Attributes:
        values: [num_values] int64 ids.
        lengths: [num_bags] int64; number of values per bag, may be 0.
        weights: [num_values] float32; factor of each id's vector in pooling. None for 1.
        is_checked: whether the lengths are validated. False for lengths on a GPU, where validation would need a device
            sync: the lookup validates them together with the ids.
    """

    values: Tensor
    lengths: Tensor
    weights: Tensor | None = None
    is_checked: ClassVar[bool] = True

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
        if self.lengths.is_cuda:
            object.__setattr__(self, "is_checked", False)
            return
        # The lengths of `from_ids` are one expanded number. Reading it once saves a slow pass over all of its copies.
        num_copies = self.lengths.numel() if self.lengths.stride() == (0,) else 1
        lengths = self.lengths[:1] if num_copies > 1 else self.lengths
        if lengths.numel() and int(lengths.min()) < 0:
            raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
        if num_copies * int(lengths.sum()) != self.values.numel():
            raise ValueError(
                f"lengths must add up to the {self.values.numel()} values, got {num_copies * int(lengths.sum())}"
            )

    @classmethod
    def from_ids(cls, ids: Tensor, weights: Tensor | None = None) -> Jagged:
        """Wraps ids [n] as n bags of one id, or ids [n, k] as n bags of k ids, with weights of the same shape.

        Raises:
            ValueError: the ids are not one- or two-dimensional, or the weights have another shape.
        """
        if ids.dim() not in (1, 2):
            raise ValueError(f"ids must be [n] or [n, k], got {tuple(ids.shape)}")
        if weights is not None and weights.shape != ids.shape:
            raise ValueError(f"weights must have the shape of ids, {tuple(ids.shape)}, got {tuple(weights.shape)}")
        num_bags, length = ids.shape[0], ids.shape[1:].numel()
        # An expanded scalar, because writing one length per bag takes longer than many lookups.
        lengths = torch.full((), length, dtype=torch.int64, device=ids.device).expand(num_bags)
        made = cls(ids.reshape(-1), lengths, None if weights is None else weights.reshape(-1))
        object.__setattr__(made, "is_checked", True)
        return made

    @classmethod
    def from_offsets(
        cls, values: Tensor, offsets: Tensor, weights: Tensor | None = None, *, include_last_offset: bool = False
    ) -> Jagged:
        """Wraps ids and the offsets of their bags, as in `torch.nn.EmbeddingBag`.

        Args:
            values: [num_values] int64 or int32.
            offsets: [num_bags]; ascending, from 0.
            weights: [num_values]; see `Jagged`.
            include_last_offset: whether offsets are [num_bags + 1] and end with the number of values.

        Raises:
            ValueError: the offsets have a wrong shape, or do not begin with 0 and end with the number of values.
        """
        if offsets.dim() != 1 or (include_last_offset and not offsets.numel()):
            raise ValueError(f"offsets must be [num_bags], or [num_bags + 1] with the last, got {tuple(offsets.shape)}")
        starts = offsets.long()
        if not include_last_offset:
            starts = torch.cat([starts, starts.new_tensor([values.numel()])])
        if not starts.is_cuda and (int(starts[0]) != 0 or int(starts[-1]) != values.numel()):
            raise ValueError(
                f"offsets must go from 0 to the {values.numel()} values, got {int(starts[0])} to {int(starts[-1])}"
            )
        return cls(values, starts.diff(), weights)

    @classmethod
    def from_lists(cls, bags: Sequence[Sequence[int]], *, device: torch.device | str = "cpu") -> Jagged:
        """Builds a batch from one sequence of ids per bag.

        Raises:
            ValueError: a bag is not a sequence, or an id is not an integer of at most 64 bits.
        """
        try:
            ids = [i for bag in bags for i in bag]
            values = torch.tensor(ids) if ids else torch.empty(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"expected a sequence of integers per bag: {error}") from error
        if values.dim() != 1 or values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
            raise ValueError(f"expected a sequence of integers per bag, got {values.dtype} {list(values.shape)}")
        values = values.to(device, torch.int64)
        lengths = torch.tensor([len(bag) for bag in bags], dtype=torch.int64, device=device)
        return cls(values, lengths)

    @property
    def num_bags(self) -> int:
        """Number of bags, including empty ones."""
        return self.lengths.numel()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Jagged:
        """Returns the batch on `device`."""
        return self._with_each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Jagged:
        """Returns the batch in page-locked memory; `DataLoader(pin_memory=True)` calls this."""
        return self._with_each(lambda tensor: tensor.pin_memory())

    def _with_each(self, function: Callable[[Tensor], Tensor]) -> Jagged:
        weights = None if self.weights is None else function(self.weights)
        moved = object.__new__(Jagged)  # Bypasses __init__, so that lengths are not validated again.
        object.__setattr__(moved, "is_checked", self.is_checked)
        for name, tensor in (
            ("values", function(self.values)),
            ("lengths", function(self.lengths)),
            ("weights", weights),
        ):
            object.__setattr__(moved, name, tensor)
        return moved

    def has_wrong_lengths(self) -> Tensor:
        """Returns whether lengths are negative or do not add up to the number of values, as a bool [] on the device."""
        return (self.lengths < 0).any() | (self.lengths.sum() != self.values.numel())

    def part(self, start: int, stop: int) -> Jagged:
        """Returns the bags `[start, stop)`, which share memory with this batch."""
        ends = self.lengths[:stop].cumsum(0)
        first, last = (int(ends[place - 1]) if place else 0 for place in (start, stop))
        weights = None if self.weights is None else self.weights[first:last]
        return Jagged(self.values[first:last], self.lengths[start:stop], weights)

    def bag_of_values(self) -> Tensor:
        """Returns [num_values] int64: the index of each value's bag."""
        bags = torch.arange(self.num_bags, device=self.lengths.device)
        return torch.repeat_interleave(bags, self.lengths)


def places_of_runs(firsts: Tensor, lengths: Tensor) -> Tensor:
    """Returns [sum(lengths)] int64: the positions of several runs of values, one run after another.

    Args:
        firsts: [n] int64; first position of each run.
        lengths: [n] int64; number of values of each run.
    """
    num_places = int(lengths.sum())
    before = lengths.cumsum(0) - lengths
    steps = torch.repeat_interleave(firsts - before, lengths, output_size=num_places)
    return torch.arange(num_places, device=lengths.device) + steps
