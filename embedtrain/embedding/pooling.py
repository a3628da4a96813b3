"""What a feature's caller asks for, a vector per id or one per bag, in the words of the op that does it."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.jagged import Jagged
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.pool_rows import Bags
from embedtrain.spec import Pooling


def bags_of(batch: Jagged, pooling: Pooling, device: torch.device) -> Bags:
    """Returns how the values of a feature are pooled, on a device; the batch may be in host memory.

    "none" weighs and keeps each vector; "sum" adds them by bag; "mean" divides the weighted sum by the bag's length.
    If gradients are enabled, what backward and the step need is copied: the caller may write to the batch at once.
    """
    weights = None
    if batch.weights is not None:
        weights = _kept(to_device(batch.weights.detach().float(), device), batch.weights)
    if pooling == "none":
        return Bags(batch.values.numel(), None, weights)
    given = batch.lengths if batch.lengths.dtype == torch.int64 else batch.lengths.long()
    # What is refused later must not have kernels write outside their memory before that.
    safe = given if batch.is_checked else _adding_up_to(given, batch.values.numel())
    lengths = _kept(to_device(safe, device), batch.lengths)
    return Bags(batch.values.numel(), lengths, weights, is_mean=pooling == "mean")


def _adding_up_to(lengths: Tensor, num_values: int) -> Tensor:
    """Returns lengths that add up to the values: the same, if they do."""
    ends = lengths.clamp(min=0).cumsum(0).clamp_(max=num_values)
    ends[-1:] = num_values
    return ends.diff(prepend=ends.new_zeros(1))


def _kept(converted: Tensor, given: Tensor) -> Tensor:
    """Returns a copy of a tensor that shares memory with the caller's, if it is kept beyond this call."""
    is_shared = torch.is_grad_enabled() and converted.data_ptr() == given.data_ptr()
    return converted.clone() if is_shared else converted
