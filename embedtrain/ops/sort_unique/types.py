"""Keys in order."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from embedtrain.ops._backend.transfer import HostCopy


@dataclass(frozen=True)
class SortedKeys:
    """Keys in order.

    Attributes:
        unique: [m] int64; the distinct keys, ascending.
        starts: [m + 1] int64; `order[starts[j] : starts[j + 1]]` are the positions of key j, ascending.
        order: [n] int64; positions of the keys in ascending order of key.
        inverse: [n] int64; the place of each key among the distinct keys. None if it was not asked for.
        is_padded: whether keys without a position follow the distinct ones; see `OrderedKeys.padded`.
    """

    unique: Tensor
    starts: Tensor
    order: Tensor
    inverse: Tensor | None
    is_padded: bool = False

    @property
    def sorted(self) -> SortedKeys:
        """The keys themselves."""
        return self

    def num_below(self, bounds: Tensor) -> Tensor:
        """Returns how many distinct keys are below each of the bounds, [n] int64."""
        return torch.searchsorted(self.unique, bounds)

    def num_keys_below(self, bounds: Tensor) -> Tensor:
        """Returns how many keys are below each of the bounds, [n] int64."""
        return self.starts[self.num_below(bounds)]


class OrderedKeys:
    """Keys in order. The host asks how many are distinct only when it needs to, since it waits for the device then.

    Args:
        keys: [n] int64.

    Attributes:
        order: see `SortedKeys`.
        is_counted: whether the host has waited for something later, or will before it needs the number of distinct
            keys: then it learns the number without a further wait.
    """

    def __init__(self, keys: Tensor, *, is_counted: bool = True) -> None:
        self.is_counted = is_counted
        self._ascending, self.order = torch.sort(keys, stable=True)
        is_new = self._ascending[1:] != self._ascending[:-1]
        # Where each key lies among the distinct ones, in ascending order of key.
        self._place = torch.nn.functional.pad(is_new.cumsum(0), (min(keys.numel(), 1), 0))
        self._last_place = HostCopy(self._place[-1:]) if keys.numel() else None

    @functools.cached_property
    def inverse(self) -> Tensor:
        """See `SortedKeys`."""
        return torch.empty_like(self.order).index_copy_(0, self.order, self._place)

    def num_below(self, bounds: Tensor) -> Tensor:
        """See `SortedKeys.num_below`."""
        counts = torch.nn.functional.pad(self._place + 1, (1, 0))
        return counts[self.num_keys_below(bounds)]

    def num_keys_below(self, bounds: Tensor) -> Tensor:
        """See `SortedKeys.num_keys_below`."""
        return torch.searchsorted(self._ascending, bounds)

    @functools.cached_property
    def sorted(self) -> SortedKeys:
        """The keys sorted, without the inverse; waits for what the device has not done yet."""
        num_distinct = int(self._last_place.item()) + 1 if self._last_place else 0
        starts = torch.searchsorted(self._place, torch.arange(num_distinct + 1, device=self._place.device))
        return SortedKeys(self._ascending[starts[:-1]], starts, self.order, None)

    def padded(self, fill: int) -> SortedKeys:
        """Returns the keys sorted, without the inverse, and waits for nothing: as many as if all were distinct.

        `fill`, which no position has, follows the distinct keys.
        """
        starts = torch.searchsorted(self._place, torch.arange(self._place.numel() + 1, device=self._place.device))
        first = starts[:-1]
        unique = self._ascending[first.clamp(max=max(self._place.numel() - 1, 0))]
        unique = unique.masked_fill(first == self._place.numel(), fill)
        return SortedKeys(unique, starts, self.order, None, is_padded=True)
