"""Sorted keys and their distinct values."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from embedtrain.ops._backend.transfer import HostCopy


@dataclass(frozen=True)
class SortedKeys:
    """Holds the distinct keys of a vector and the positions of each.

    Attributes:
        unique: [m] int64; the distinct keys, ascending.
        starts: [m + 1] int64; `order[starts[j] : starts[j + 1]]` are the positions of `unique[j]`, ascending.
        given_order: `order`, or a function that computes it. Distinct rows are read and updated without the order.
        inverse: [n] int64; the index of each key in `unique`. None if it was not requested.
        is_padded: whether padding, keys without a position, follows the distinct keys; see `OrderedKeys.padded`.
    """

    unique: Tensor
    starts: Tensor
    given_order: Tensor | Callable[[], Tensor]
    inverse: Tensor | None
    is_padded: bool = False

    @functools.cached_property
    def order(self) -> Tensor:
        """[n] int64; the positions of all keys, sorted by key."""
        return self.given_order if isinstance(self.given_order, Tensor) else self.given_order()

    @property
    def sorted(self) -> SortedKeys:
        """This object, for callers that take `OrderedKeys` too."""
        return self

    def num_below(self, bounds: Tensor) -> Tensor:
        """Returns the number of distinct keys below each bound, [n] int64."""
        return torch.searchsorted(self.unique, bounds)

    def num_keys_below(self, bounds: Tensor) -> Tensor:
        """Returns the number of keys below each bound, [n] int64."""
        return self.starts[self.num_below(bounds)]


class OrderedKeys:
    """Sorts keys on a device and copies the number of distinct keys to the host only when it is needed.

    Args:
        keys: [n] int64.

    Attributes:
        order: see `SortedKeys`.
        is_counted: whether the caller waits for a later result of the device anyway before it needs the number of
            distinct keys. Then reading the number needs no further wait.
    """

    def __init__(self, keys: Tensor, *, is_counted: bool = True) -> None:
        self.is_counted = is_counted
        self._ascending, self.order = torch.sort(keys, stable=True)
        is_new = self._ascending[1:] != self._ascending[:-1]
        # The index of each key among the distinct keys, sorted by key.
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
        """The sorted keys, without the inverse; waits for the number of distinct keys."""
        num_distinct = int(self._last_place.item()) + 1 if self._last_place else 0
        starts = torch.searchsorted(self._place, torch.arange(num_distinct + 1, device=self._place.device))
        return SortedKeys(self._ascending[starts[:-1]], starts, self.order, None)

    def padded(self, fill: int) -> SortedKeys:
        """Returns the sorted keys, without the inverse and without waiting for the number of distinct keys.

        `unique` has n elements: the distinct keys, then copies of `fill`, which have no positions.
        """
        starts = torch.searchsorted(self._place, torch.arange(self._place.numel() + 1, device=self._place.device))
        first = starts[:-1]
        unique = self._ascending[first.clamp(max=max(self._place.numel() - 1, 0))]
        unique = unique.masked_fill(first == self._place.numel(), fill)
        return SortedKeys(unique, starts, self.order, None, is_padded=True)
