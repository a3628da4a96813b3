"""Converts the bags of a feature and its pooling to the arguments of the pooling op."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.jagged import Jagged
from embedtrain.ops._backend.transfer import to_device
from embedtrain.ops.pool_rows import Bags
from embedtrain.spec import Pooling


def bags_of(batch: Jagged, pooling: Pooling, device: torch.device) -> Bags:
    """Returns the bags of a feature on a device, as the pooling op takes them; the batch may be in host memory.

    "none" returns each vector times its weight, "sum" the weighted sum per bag, and "mean" the weighted sum divided by
    the bag's length. If gradients are enabled, tensors that backward and the step need are copied, so that the caller
    may overwrite the batch at once.
    """
    weights = None
    if batch.weights is not None:
        weights = _kept(to_device(batch.weights.detach().float(), device), batch.weights)
    if pooling == "none":
        return Bags(batch.values.numel(), None, weights)
    given = batch.lengths if batch.lengths.dtype == torch.int64 else batch.lengths.long()
    # Wrong lengths are refused later. Until then they must not make kernels write outside their memory.
    safe = given if batch.is_checked else _adding_up_to(given, batch.values.numel())
    lengths = _kept(to_device(safe, device), batch.lengths)
    return Bags(batch.values.numel(), lengths, weights, is_mean=pooling == "mean")


def _adding_up_to(lengths: Tensor, num_values: int) -> Tensor:
    """Returns lengths that add up to the number of values; unchanged if they already do."""
    ends = lengths.clamp(min=0).cumsum(0).clamp_(max=num_values)
    ends[-1:] = num_values
    return ends.diff(prepend=ends.new_zeros(1))


def _kept(converted: Tensor, given: Tensor) -> Tensor:
    """Returns a copy of the tensor if it shares memory with `given` and is kept for backward."""
    is_shared = torch.is_grad_enabled() and converted.data_ptr() == given.data_ptr()
    return converted.clone() if is_shared else converted
