"""The distinct keys among many, in ascending order, and the positions of each."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.sort_unique import native, reference
from embedtrain.ops.sort_unique.types import OrderedKeys, SortedKeys

__all__ = ["OrderedKeys", "SortedKeys", "order_keys", "sort_unique"]


def sort_unique(keys: Tensor, *, bound: int | None = None, with_inverse: bool = True) -> SortedKeys:
    """Finds the distinct keys.

    Args:
        keys: [n] int64, none negative.
        bound: all keys are below it. None looks for the largest key.
        with_inverse: whether the inverse is wanted.

    Raises:
        ValueError: the keys are not a vector of int64.
        IndexError: a key is negative or not below the bound. Sorts that compare whole keys do not look.

    The native sort packs a key and its position into 64 bits; keys too large for that (from 2**40 for 2**24 of them)
    are sorted by the reference.
    """
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"expected keys [n] int64, got {keys.dtype} {tuple(keys.shape)}")
    if keys.numel() and dispatch.uses_native(keys):
        largest = int(keys.max()) if bound is None else bound - 1
        if largest.bit_length() + keys.numel().bit_length() <= 64:
            return native.sort_unique(keys, largest, with_inverse)
    return reference.sort_unique(keys, with_inverse)


def order_keys(keys: Tensor, *, bound: int, with_inverse: bool = True) -> OrderedKeys | SortedKeys:
    """Sorts keys as `sort_unique` does, as far as that goes without waiting for a device."""
    return (
        sort_unique(keys, bound=bound, with_inverse=with_inverse) if dispatch.uses_native(keys) else OrderedKeys(keys)
    )
