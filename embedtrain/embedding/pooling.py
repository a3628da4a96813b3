"""What a feature's caller asks for, a vector per id or one per bag, in the words of the op that does it."""

from __future__ import annotations

import torch

from embedtrain.jagged import Jagged
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.pool_rows import Bags
from embedtrain.spec import Pooling


def bags_of(batch: Jagged, pooling: Pooling, device: torch.device) -> Bags:
    """Returns how the values of a feature are pooled, on a device; the batch may be in host memory.

    "none" weighs and keeps each vector; "sum" adds them by bag; "mean" divides the weighted sum by the bag's length.
    """
    weights = None if batch.weights is None else to_device(batch.weights.detach().float(), device)
    if pooling == "none":
        return Bags(batch.values.numel(), None, weights)
    lengths = to_device(batch.lengths.long(), device)
    return Bags(batch.values.numel(), lengths, weights, is_mean=pooling == "mean")
