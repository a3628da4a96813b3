"""The distinct ones of many keys, in ascending order, and where each of them occurs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedtrain.ops import dispatch


@dataclass(frozen=True)
class SortedKeys:
    """Keys in order.

    Attributes:
        unique: [m] int64; the distinct keys, ascending.
        starts: [m + 1] int64; `order[starts[j] : starts[j + 1]]` are the positions of key j, ascending.
        order: [n] int64; positions of the keys in ascending order of key.
        inverse: [n] int64; where each key lies among the distinct ones. None where it was not asked for.
    """

    unique: Tensor
    starts: Tensor
    order: Tensor
    inverse: Tensor | None


def sort_unique(keys: Tensor, *, bound: int | None = None, with_inverse: bool = True) -> SortedKeys:
    """Finds the distinct keys.

    Args:
        keys: [n] int64, none negative.
        bound: all keys are below it, as the caller knows; where None, it is looked for.
        with_inverse: whether the inverse is wanted.

    Raises:
        ValueError: the keys are not a vector of int64.

    The native sort packs a key and its position into 64 bits; keys too large for that (from 2**40 for 2**24 of them)
    are sorted by the reference.
    """
    if keys.dtype != torch.int64 or keys.dim() != 1:
        raise ValueError(f"expected keys [n] int64, got {keys.dtype} {tuple(keys.shape)}")
    if keys.numel() and dispatch.uses_native(keys):
        largest = int(keys.max()) if bound is None else bound - 1
        if largest.bit_length() + keys.numel().bit_length() <= 64:
            from embedtrain.ops.native import sort_unique as native

            return native.sort_unique(keys, largest, with_inverse)
    from embedtrain.ops.reference import sort_unique as reference

    return reference.sort_unique(keys, with_inverse)
