"""Computes loss and gradient of the word2vec objective over a block of text, on the block's distinct rows."""

from __future__ import annotations

import torch
from torch import Tensor

from embedtrain.ops._backend import dispatch
from embedtrain.ops.sample_text import TextSample
from embedtrain.ops.skipgram_block import native, reference
from embedtrain.ops.skipgram_block.types import Architecture, TextBlock

__all__ = ["Architecture", "TextBlock", "count_of_rows", "count_predictions", "reach_of", "skipgram_block"]


_PARTS = 1 << 10
"""Units per prediction for the counts of CBOW, in which the contexts of a centre share its predictions."""


def skipgram_block(
    vectors: Tensor,
    block: TextBlock,
    architecture: Architecture = "skipgram",
    factor: float = 1.0,
    buffer: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the negative-sampling loss of a block and its gradient in one pass.

    Skip-gram: each context word of a centre predicts the centre against the centre's negatives; all contexts of a
    centre share its negatives. CBOW: the mean of the context words predicts the centre, once per centre.

    Args:
        vectors: [num_rows, dim] float32; the distinct input and output rows of the block.
        block: the words, windows and negatives.
        architecture: "skipgram" or "cbow".
        factor: positive; multiplies the loss and the gradient. For the gradient, another pass would cost more.
        buffer: [num_rows, dim] float32, contiguous; memory that the gradient may be returned in. Only the native
            kernel uses it.

    Returns:
        loss: scalar float64; `factor` times the sum over all predictions of `-log sigmoid(u.v) - sum_k log
            sigmoid(-u.n_k)`.
        grad: [num_rows, dim] float32; the gradient of the loss with respect to `vectors`.

    Raises:
        ValueError: shapes or dtypes disagree, the factor is not positive, or an index is out of range. Indices are not
            checked on a GPU, because it would need a device sync.

    Source: Mikolov et al. 2013, "Distributed representations of words and phrases and their
    compositionality"; contexts grouped by centre as in Ji et al. 2016, "Parallelizing word2vec in shared and
    distributed memory".
    """
    _check_shapes(vectors, block)
    if not factor > 0:
        raise ValueError(f"factor must be positive, got {factor}")
    if dispatch.uses_native(vectors) and architecture == "skipgram":
        result = native.skipgram_block(vectors, block, factor, buffer)
        if result is not None:
            return result
    if not vectors.is_cuda:
        _check_indices(vectors, block)
    if dispatch.uses_triton(vectors):
        from embedtrain.ops.skipgram_block import triton

        reach = reach_of(block.starts, block.stops) if block.reach is None else block.reach
        return triton.skipgram_block(vectors, block, architecture, factor, reach)
    return reference.skipgram_block(vectors, block, architecture, factor)


def count_predictions(block: TextBlock | TextSample, architecture: Architecture = "skipgram") -> Tensor:
    """Returns the number of predictions in the block, scalar int64; the mean loss is the loss divided by it."""
    if architecture == "skipgram":  # without a vector of the contexts of each centre
        return block.stops.sum() - block.starts.sum() - block.stops.numel()
    return (block.stops - block.starts > 1).sum()


def count_of_rows(block: TextBlock, num_rows: int, architecture: Architecture = "skipgram") -> Tensor:
    """Returns the number of predictions that each row takes part in, [num_rows] float32.

    A prediction is a pair of a context word and one of the centre's targets. Negatives that the loss skips count too.
    In CBOW the contexts of a centre share its predictions, so each context counts a fraction of them. The counts are
    sums of integers, so they do not depend on the order of summation; they are exact up to 2**24.
    """
    if architecture == "skipgram" and dispatch.uses_native(block.inputs):
        return native.count_of_rows(block, num_rows)
    num_targets = block.targets.shape[1]
    contexts = block.stops - block.starts - 1
    if architecture == "cbow":
        of_centre = (contexts > 0).long()
        of_context = torch.where(contexts > 0, _PARTS * num_targets // contexts.clamp(min=1), 0)
    else:
        of_centre, of_context = contexts, torch.full_like(contexts, num_targets)
    # A word is a context of every centre whose window contains it, except of itself.
    begun = torch.zeros(block.num_positions + 1, dtype=torch.int64, device=contexts.device)
    begun.index_add_(0, block.starts, of_context).index_add_(0, block.stops, -of_context)
    of_word = begun.cumsum(0)[:-1] - of_context
    inputs = torch.zeros(num_rows, dtype=torch.int64, device=contexts.device)
    inputs.index_add_(0, block.inputs, of_word)
    counts = inputs.float() / _PARTS if architecture == "cbow" else inputs.float()
    outputs = torch.zeros_like(inputs)
    outputs.index_add_(0, block.targets.flatten(), of_centre.repeat_interleave(num_targets))
    return counts + outputs.float()


def reach_of(starts: Tensor, stops: Tensor) -> int:
    """Returns the largest distance of a word in a window from the window's centre."""
    if starts.numel() == 0:
        return 0
    positions = torch.arange(starts.numel(), device=starts.device)
    return int(torch.maximum(positions - starts, stops - 1 - positions).max())


def _check_shapes(vectors: Tensor, block: TextBlock) -> None:
    n = block.num_positions
    if vectors.dim() != 2 or vectors.dtype != torch.float32:
        raise ValueError(f"expected vectors [num_rows, dim] float32, got {tuple(vectors.shape)} {vectors.dtype}")
    if block.targets.dim() != 2 or block.targets.shape[0] != n or block.targets.shape[1] == 0:
        raise ValueError(f"expected targets [{n}, 1 + k], got {tuple(block.targets.shape)}")
    for name in ("inputs", "targets", "starts", "stops"):
        tensor = getattr(block, name)
        if tensor.dtype != torch.int64 or (name != "targets" and tensor.shape != (n,)):
            raise ValueError(f"expected {name} int64 [{n}], got {tensor.dtype} {tuple(tensor.shape)}")


def _check_indices(vectors: Tensor, block: TextBlock) -> None:
    n, rows = block.num_positions, vectors.shape[0]
    if n == 0:
        return
    for name in ("inputs", "targets"):
        low, high = (int(bound) for bound in torch.aminmax(getattr(block, name)))
        if low < 0 or high >= rows:
            raise ValueError(f"{name} must lie in [0, {rows}), got {low} to {high}")
    positions = torch.arange(n, device=block.starts.device)
    inside = (block.starts >= 0) & (block.starts <= positions) & (positions < block.stops) & (block.stops <= n)
    if not bool(inside.all()):
        raise ValueError("each window [starts, stops) must contain its centre and lie inside the block")
