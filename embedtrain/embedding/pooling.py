"""What a feature's caller asks for, a vector per id or one per bag, in the words of the op that does it."""

from __future__ import annotations

from embedtrain.jagged import Jagged
from embedtrain.ops.pool_rows import Bags
from embedtrain.spec import Pooling


def bags_of(batch: Jagged, pooling: Pooling) -> Bags:
    """Returns how the values of a feature are pooled.

    "none" weighs and keeps each vector; "sum" adds them by bag; "mean" divides the weighted sum by the bag's length.
    """
    weights = None if batch.weights is None else batch.weights.detach().float()
    if pooling == "none":
        return Bags(batch.values.numel(), None, weights)
    return Bags(batch.values.numel(), batch.lengths.long(), weights, is_mean=pooling == "mean")
