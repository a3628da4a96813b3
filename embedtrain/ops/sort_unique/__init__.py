"""Finds distinct keys in ascending order, and the positions of each key."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.sort_unique import native, reference
from embedtrain.ops.sort_unique.types import OrderedKeys, SortedKeys

__all__ = ["OrderedKeys", "SortedKeys", "order_keys", "sort_unique"]


def sort_unique(keys: Tensor, *, bound: int | None = None, with_inverse: bool = True) -> SortedKeys:
    """Finds the distinct keys and the positions of each.

    The native sort packs a key and its position into 64 bits. The reference sorts keys that are too large for that
    (for 2**24 keys, from 2**40 on).

    Args:
        keys: [n] int64, not negative.
        bound: exclusive upper bound of the keys. None finds the largest key first.
        with_inverse: whether to compute `SortedKeys.inverse`.

    Raises:
        ValueError: `keys` is not an int64 vector.
        IndexError: a key is negative or not below the bound. Only the native sort checks this.
    """
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"expected keys [n] int64, got {keys.dtype} {tuple(keys.shape)}")
    if keys.numel() and dispatch.uses_native(keys):
        largest = int(keys.max()) if bound is None else bound - 1
        if largest.bit_length() + keys.numel().bit_length() <= 64:
            return native.sort_unique(keys, largest, with_inverse)
    return reference.sort_unique(keys, with_inverse)


def order_keys(keys: Tensor, *, bound: int, with_inverse: bool = True) -> OrderedKeys | SortedKeys:
    """Sorts keys as `sort_unique` does; on a GPU without a wait for the number of distinct keys."""
    return (
        sort_unique(keys, bound=bound, with_inverse=with_inverse) if dispatch.uses_native(keys) else OrderedKeys(keys)
    )
