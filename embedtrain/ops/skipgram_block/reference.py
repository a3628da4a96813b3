"""Negative-sampling loss and gradient of a block in plain PyTorch, in batches of small matrix products."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from embedtrain.ops.skipgram_block.types import Architecture, TextBlock

_CENTRES_AT_ONCE = 512
"""Limits the memory of the gathered context vectors: 512 centres of 10 contexts at dim 100 are 2 MB, about one L2
cache."""


def skipgram_block(
    vectors: Tensor, block: TextBlock, architecture: Architecture, factor: float
) -> tuple[Tensor, Tensor]:
    """See `embedtrain.ops.skipgram_block`."""
    loss = torch.zeros((), dtype=torch.float64, device=vectors.device)
    grad = torch.zeros_like(vectors)
    for first in range(0, block.num_positions, _CENTRES_AT_ONCE):
        centres = torch.arange(first, min(first + _CENTRES_AT_ONCE, block.num_positions), device=vectors.device)
        loss += _add_centres(vectors, block, centres, architecture, grad)
    return loss.mul_(factor), grad.mul_(factor)


def _add_centres(
    vectors: Tensor, block: TextBlock, centres: Tensor, architecture: Architecture, grad: Tensor
) -> Tensor:
    """Adds the gradient of some centres to `grad` and returns their loss."""
    contexts, is_context = _context_positions(block, centres)
    context_rows = block.inputs[contexts]  # [c, p]
    target_rows = block.targets[centres]  # [c, 1 + k]
    context = vectors[context_rows].where(is_context.unsqueeze(2), 0.0)  # [c, p, dim]
    target = vectors[target_rows]  # [c, 1 + k, dim]
    counted = target_rows != target_rows[:, :1]
    counted[:, 0] = True
    counted = counted.unsqueeze(1)
    if architecture == "cbow":
        num_contexts = is_context.sum(dim=1).clamp(min=1).to(vectors.dtype)[:, None, None]
        predictor = context.sum(dim=1, keepdim=True) / num_contexts  # [c, 1, dim]
        counted = counted & is_context.any(dim=1)[:, None, None]
    else:
        predictor = context
        counted = counted & is_context.unsqueeze(2)
    logits = predictor @ target.transpose(1, 2)  # [c, p or 1, 1 + k]
    signed = torch.cat([-logits[..., :1], logits[..., 1:]], dim=2)
    loss = F.softplus(signed).where(counted, 0.0).sum(dtype=torch.float64)
    slope = torch.sigmoid(logits)
    slope[..., 0] -= 1.0
    slope = slope.where(counted, 0.0)
    context_grad = slope @ target
    if architecture == "cbow":
        context_grad = (context_grad / num_contexts).expand_as(context)
    context_grad = context_grad.where(is_context.unsqueeze(2), 0.0)
    dim = vectors.shape[1]
    grad.index_add_(0, context_rows.flatten(), context_grad.reshape(-1, dim))
    grad.index_add_(0, target_rows.flatten(), (slope.transpose(1, 2) @ predictor).reshape(-1, dim))
    return loss


def _context_positions(block: TextBlock, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the context positions of each centre, [c, p] int64, padded, and a mask of the real ones, [c, p] bool."""
    starts, stops = block.starts[centres], block.stops[centres]
    width = max(int((stops - starts).max()), 1)
    positions = starts.unsqueeze(1) + torch.arange(width, device=centres.device)
    real = (positions < stops.unsqueeze(1)) & (positions != centres.unsqueeze(1))
    return positions.clamp(max=block.num_positions - 1), real
