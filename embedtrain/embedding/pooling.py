"""From distinct rows to what a feature's caller asked for: a vector per id or one per bag."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embedtrain.jagged import Jagged
from embedtrain.spec import Pooling


def pool(vectors: Tensor, inverse: Tensor, bags: Jagged, pooling: Pooling) -> Tensor:
    """Gathers the vectors of the ids, weighted, and pools them by bag.

    Args:
        vectors: [num_distinct, dim] float32.
        inverse: [num_values] int64; the distinct row of each value.
        bags: lengths and weights; of its values only the number counts.
        pooling: "none" weighs and keeps each vector; "sum" adds them; "mean" divides the weighted sum by the
            bag's length.

    Returns:
        [num_values, dim] without pooling, else [num_bags, dim]; zeros for an empty bag.
    """
    if pooling == "none":
        gathered = vectors.index_select(0, inverse)
        return gathered if bags.weights is None else gathered * bags.weights.unsqueeze(1)
    weights = bags.weights
    if pooling == "mean":
        per_value = torch.repeat_interleave(bags.lengths.to(vectors.dtype), bags.lengths).reciprocal()
        weights = per_value if weights is None else weights * per_value
    offsets = bags.lengths.cumsum(0) - bags.lengths
    return F.embedding_bag(inverse, vectors, offsets, mode="sum", per_sample_weights=weights)
