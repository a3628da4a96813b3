"""Calls the native skip-gram kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops.native import library
from embedtrain.ops.skipgram_block import TextBlock


def skipgram_block(vectors: Tensor, block: TextBlock) -> tuple[Tensor, Tensor]:
    """See `embedtrain.ops.skipgram_block`."""
    vectors = vectors.contiguous()
    indices = [
        tensor.contiguous() for tensor in (block.inputs, block.outputs, block.negatives, block.starts, block.stops)
    ]
    loss = torch.zeros((), dtype=torch.float64)
    grad = torch.zeros_like(vectors)
    library.get().embedtrain_skipgram_block(
        vectors.data_ptr(),
        *vectors.shape,
        *(tensor.data_ptr() for tensor in indices),
        *block.negatives.shape,
        loss.data_ptr(),
        grad.data_ptr(),
    )
    return loss, grad
